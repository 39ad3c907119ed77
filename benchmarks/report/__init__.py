"""From a results folder to tables, plots and the page; measures nothing."""
