"""Perplexity, KL and tasks of one cell. Every file here determines a number, and is hashed."""
