"""Measures zero-shot accuracy on lm-eval's own tasks."""
