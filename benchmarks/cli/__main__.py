from resting.benchmarks.cli.main import main

main()
