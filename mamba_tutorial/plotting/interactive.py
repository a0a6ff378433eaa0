"""Pictures that the reader moves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.ticks import even, written


@dataclass(frozen=True, repr=False)
class Interactive:
    """A picture that the reader moves, drawn in the page by a few lines of JavaScript.

    Needs no network and no running kernel: all that it shows was computed before. Built by `slider`
    and `scan_steps`.

    Attributes:
        script: a file beside this one, which draws the figure in the frame that is `slider.html`.
        data: a value and a note for each place of the slider, and what the script draws.
        name: what a reader without HTML sees.
    """

    script: str
    data: dict
    name: str

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _repr_html_(self) -> str:
        here = files("mamba_tutorial.plotting")
        frame = here.joinpath("slider.html").read_text(encoding="utf-8")
        script = here.joinpath(self.script).read_text(encoding="utf-8")
        data = json.dumps(self.data, separators=(",", ":"))
        return frame.replace("{{script}}", script.rstrip()).replace("{{data}}", data)


def slider(
    x: ArrayLike | Sequence[str],
    fixed: Mapping[str, ArrayLike],
    moving: Mapping[str, ArrayLike],
    *,
    label: str,
    values: Sequence[float | int],
    notes: Sequence[str],
    start: int,
    xlabel: str,
    description: str,
    smooth: bool = False,
) -> Interactive:
    """Draw signals, some fixed and some that move with a slider: as staircases, or smooth.

    A value that is NaN is not drawn.

    Args:
        x: (length,), the positions of the samples, or what each is called.
        fixed: signals that stay, {label: (length,)}.
        moving: signals for each value of the slider, {label: (values, length)}.
        label: what the slider sets, such as "Δ".
        values: its values, in order.
        notes: what to say under the picture at each value.
        start: the index of the value that is shown first.
        xlabel: label of the x axis.
        description: what the picture shows, for those who cannot see it.
        smooth: join the values by straight lines in the place of stairs.
    """
    drawn = [*fixed.values(), *(curve for each in moving.values() for curve in each)]
    everything = np.concatenate([np.asarray(curve, dtype=float) for curve in drawn])
    marks = even(np.nanmin(everything), np.nanmax(everything), 5)
    return Interactive(
        "curves.js",
        {
            "length": len(x),
            "xticks": _ticks(x),
            "yticks": [[value, label] for value, label in zip(marks, written(marks), strict=True)],
            "fixed": {name: _short(curve) for name, curve in fixed.items()},
            "moving": {name: [_short(c) for c in curves] for name, curves in moving.items()},
            "label": f"{label} =",
            "values": [_rounded(value) for value in values],
            "notes": list(notes),
            "start": start,
            "xlabel": xlabel,
            "description": description,
            "smooth": smooth,
        },
        f"{label}: a figure with a slider of {len(values)} steps",
    )


def scan_steps(
    steps: Sequence, notes: Sequence[str], *, start: int, description: str
) -> Interactive:
    """Draw the steps of a scan, which the reader goes through with a slider.

    Each place shows a row of cells, one for each element of the input; those that have been
    combined there are filled, and those that changed in the step are orange. Lines lead from the
    two operands, the earlier one blue, to the place of the result, which is the later of the two.

    Args:
        steps: each with `intervals` and `joined`, as `mamba_tutorial.scan.trace` returns them.
        notes: what to say under the picture at each step.
        start: the step that is shown first.
        description: what the picture shows, for those who cannot see it.
    """
    drawn = [
        {
            "intervals": step.intervals,
            "joined": [(left, right, max(left, right)) for left, right in step.joined],
        }
        for step in steps
    ]
    data = {
        "steps": drawn,
        "label": "Step",
        "values": [f"{i} of {len(drawn) - 1}" for i in range(len(drawn))],
        "notes": [note for _, note in zip(steps, notes, strict=True)],
        "start": start,
        "description": description,
    }
    return Interactive("steps.js", data, f"a figure with a slider of {len(drawn)} steps")


def _rounded(value: float) -> str:
    return (f"{value:.3g}" if value % 1 else f"{value:g}").replace("-", "−")


def _ticks(x: ArrayLike | Sequence[str]) -> list[list]:
    """Return names or round numbers for an axis: where each stands, counted in samples."""
    if isinstance(x[0], str):
        return [[place, name] for place, name in enumerate(x)]
    x = np.asarray(x, dtype=float)
    marks = even(x[0], x[-1], 6)
    if np.all(x == np.round(x)):  # samples that are counted have no halves
        marks = [mark for mark in marks if mark == round(mark)]
    places = [round(float((mark - x[0]) / (x[1] - x[0])), 3) for mark in marks]
    return [[place, label] for place, label in zip(places, written(marks), strict=True)]


def _short(values: ArrayLike) -> list[float | None]:
    """Round to what a screen can show, to keep the page small; NaN becomes None."""
    return [None if np.isnan(v) else round(float(v), 3) for v in np.asarray(values)]
