"""Stores weights in fewer bits: formats, codes with scales for every input, and how they are found."""
