"""Turns a suite file into a list of cells, each with a hash of all that determines its numbers."""
