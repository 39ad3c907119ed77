"""Looks inside: what sparsity and its compensation do to hidden states, beside how well the model predicts."""
