"""Models and texts: found, fetched, verified by hash, and read."""
