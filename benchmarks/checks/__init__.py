"""Measures committed numbers again."""
