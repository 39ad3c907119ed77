"""Looks inside methods: what sparsity and its compensation do to hidden states."""
