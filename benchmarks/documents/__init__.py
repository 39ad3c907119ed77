"""Reads documents of the user's own: from files, and from data sets on the Hugging Face hub."""
