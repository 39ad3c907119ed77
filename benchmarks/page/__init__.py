"""Writes the page of all results, one HTML file that needs no server."""
