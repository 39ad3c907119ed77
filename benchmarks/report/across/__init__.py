"""Joins results folders of one protocol: loss against the size of models, or against the length of contexts."""
