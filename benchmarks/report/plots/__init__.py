"""Draws the plots of a results folder: every kind is data first (`chart.Chart`), and one renderer draws all of them."""

from resting.benchmarks.report.plots.draw import plt, save

__all__ = ["plt", "save"]
