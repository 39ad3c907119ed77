"""Trains spontaneous neurons (arXiv 2512.12744): input-independent activations in place of what a sparsifier drops."""
