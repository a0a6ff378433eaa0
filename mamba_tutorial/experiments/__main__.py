"""The command python -m mamba_tutorial.experiments."""

from mamba_tutorial.experiments import main

main()
