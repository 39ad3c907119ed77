"""Runs many cells: the store of what is finished, jobs of cells, and who runs them."""
