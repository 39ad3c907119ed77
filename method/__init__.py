"""Spontaneous neurons (arXiv 2512.12744): input-independent activations that stand in for what a sparsifier drops."""
