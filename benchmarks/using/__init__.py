"""Uses fitted plans: text from a model under one, a folder for transformers, and lm-eval's command line."""
