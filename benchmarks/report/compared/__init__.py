"""Compares: ranks of methods, what rounding alone explains, and published figures beside measured ones."""
