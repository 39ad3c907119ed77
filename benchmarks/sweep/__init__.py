"""Running many cells: the store of what is finished, groups of cells, and who runs them."""
