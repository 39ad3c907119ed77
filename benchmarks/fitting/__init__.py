"""Fits a method to a model that is in memory: ``resting.fit`` and the command of that name."""
