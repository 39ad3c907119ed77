"""Decoding on a GPU: the dense and the sparse step, each one CUDA graph."""
