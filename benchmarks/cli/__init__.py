"""Implements the command ``resting``."""
