"""From a suite file to the list of cells, each with a hash of all that determines its numbers."""
