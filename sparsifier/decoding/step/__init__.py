"""Computes a decoded token of a whole model in few launches, or few calls, from a description of its blocks."""
