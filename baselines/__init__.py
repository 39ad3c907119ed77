"""Holds the published sparsifiers, one file each, with a class and its mathematics; the suite finds a new file here."""
