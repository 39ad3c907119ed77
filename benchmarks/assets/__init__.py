"""Finds, fetches, verifies and reads models and texts."""
