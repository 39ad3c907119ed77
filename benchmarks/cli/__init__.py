"""The command resting."""
