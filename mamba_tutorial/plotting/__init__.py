"""The pictures of the chapters. Each function takes arrays and returns a Figure.

Importing this package sets the book's style (`style`). Each room holds the pictures of one kind or
of one chapter.
"""

from mamba_tutorial.plotting.discretisation import (
    convergence,
    descent,
    one_step,
    stability_regions,
    staircase,
)
from mamba_tutorial.plotting.gpu import (
    look_back,
    memories,
    register_tile,
    scan_levels,
    shared_channels,
    timelines,
    works_on,
)
from mamba_tutorial.plotting.grids import images, matrices, tensors, text_heat, token_heat
from mamba_tutorial.plotting.interactive import Interactive, scan_steps, slider
from mamba_tutorial.plotting.lines import curves, points, time_series
from mamba_tutorial.plotting.models import block_diagram, mamba_block, s4_pipeline
from mamba_tutorial.plotting.rows import bars, schedule, spread
from mamba_tutorial.plotting.style import WIDTH
from mamba_tutorial.plotting.svg import show_in_notebooks
from mamba_tutorial.plotting.systems import crossing, kicks, maze, modes, phase_planes

__all__ = [
    "WIDTH",
    "Interactive",
    "bars",
    "block_diagram",
    "convergence",
    "crossing",
    "curves",
    "descent",
    "images",
    "kicks",
    "look_back",
    "mamba_block",
    "matrices",
    "maze",
    "memories",
    "modes",
    "one_step",
    "phase_planes",
    "points",
    "register_tile",
    "s4_pipeline",
    "scan_levels",
    "scan_steps",
    "schedule",
    "shared_channels",
    "slider",
    "spread",
    "stability_regions",
    "staircase",
    "tensors",
    "text_heat",
    "time_series",
    "timelines",
    "token_heat",
    "works_on",
]

show_in_notebooks()
