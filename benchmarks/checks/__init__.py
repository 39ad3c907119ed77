"""Committed numbers, measured again."""
