"""Measure the scans on a CPU."""

from mamba_tutorial.benchmark.cpu import main

if __name__ == "__main__":
    main()
