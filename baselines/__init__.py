"""Published sparsifiers, one file each: a class and its mathematics. Drop a file here and the suite finds it."""
