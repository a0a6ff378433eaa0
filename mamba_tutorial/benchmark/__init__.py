"""How fast it is, side by side with others.

- `cpu`: the selective scan on a CPU, `python -m mamba_tutorial.benchmark`;
- `gpu`: on one GPU, section by section, `python -m mamba_tutorial.benchmark.gpu`;
- `distributed`: over several, `python -m mamba_tutorial.benchmark.distributed`.

The sections of `gpu` are in rooms of their own: `units`, `recurrence`, `scans`, `attention`,
`writing` and `learning`. All are timed by `measuring`, but for `units`, whose kernels read the
clock themselves; the whole models are those of `models`.
"""
