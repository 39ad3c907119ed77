"""The harness: suites, assets, measurements, cells, reports and the command line."""
