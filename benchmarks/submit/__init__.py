"""Checks results that somebody sends in, and writes what a pull request needs."""
