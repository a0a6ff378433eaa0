"""The pictures of the chapters. Each function takes arrays and returns a Figure.

Importing this module sets the book's style. Colours keep apart in every common form of colour
blindness and differ in lightness, and lines differ in dash, so a picture survives a grey
printer. The background is white; the book's style sheet turns it dark where the page is.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike

INK, BLUE, ORANGE, TEAL, PLUM, GREY = (
    "#1b1f24",
    "#1f5fa8",
    "#d9731a",
    "#1d9a83",
    "#8a3f8f",
    "#8a9099",
)
PALE = "#e8edf3"
HEAT = LinearSegmentedColormap.from_list("heat", ["white", "#f6c9a0", ORANGE, "#6b3206"])
WIDTH = 8.0  # inches: the width of a page's text

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.figsize": (WIDTH, 3.2),
        "figure.constrained_layout.use": True,
        "font.size": 10.5,
        "mathtext.fontset": "cm",
        "axes.prop_cycle": cycler(
            color=[BLUE, ORANGE, TEAL, PLUM, INK],
            linestyle=["-", "--", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1))],
        ),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "lines.linewidth": 1.7,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
    }
)

if "IPython" in sys.modules:
    from IPython import get_ipython

    if hasattr(get_ipython(), "kernel"):  # in a notebook: twice the pixels at the same size
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")

Panels = Mapping[str, Mapping[str, ArrayLike]]


def time_series(
    t: ArrayLike, panels: Panels, *, xlabel: str = "time (s)", height: float = 1.7, held=()
) -> Figure:
    """Draw panels of labelled signals over one time axis, one panel below the other.

    Args:
        t: (length,), the times of the samples.
        panels: for each panel its y label and its signals, {ylabel: {label: (length,)}}.
        xlabel: label of the time axis.
        height: height of a panel in inches.
        held: labels of the signals to draw as staircases, each sample kept until the next.
    """
    figure, axes = _subplots(height * len(panels) + 0.4, rows=len(panels), sharex=True)
    labelled = None  # a legend stands above the first panel that it is for
    for ax, (ylabel, signals) in zip(axes, panels.items(), strict=True):
        for label, signal in signals.items():
            style = "steps-post" if label in held else "default"
            ax.plot(t, np.asarray(signal), label=label, drawstyle=style)
        ax.set_ylabel(ylabel)
        ax.margins(x=0)
        if len(signals) > 1 and list(signals) != labelled:
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.96), ncols=len(signals))
            labelled = list(signals)
    axes[-1].set_xlabel(xlabel)
    return figure


def curves(
    x: ArrayLike,
    panels: Panels,
    *,
    xlabel: str,
    ylabel: str,
    log: str = "",
    markers: bool = False,
    mark: float | None = None,
    height: float = 3.1,
) -> Figure:
    """Draw panels of labelled curves side by side.

    Args:
        x: the common x values; a curve with fewer values ends early.
        panels: for each panel its title and its curves, {title: {label: values}}.
        xlabel: label of the x axes.
        ylabel: label of the first y axis.
        log: the axes that are logarithmic, "x", "y" or "xy".
        markers: mark each value.
        mark: where on the x axes to draw a dashed line.
        height: height of the picture in inches.
    """
    figure, axes = _subplots(height, columns=len(panels))
    x = np.asarray(x)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for (label, values), marker in zip(lines.items(), "osD^" * 3, strict=False):
            values = np.asarray(values)
            ax.plot(x[: len(values)], values, label=label, marker=marker if markers else "", ms=4)
        ax.set(title=title, xlabel=xlabel)
        if mark is not None:
            ax.axvline(mark, color=INK, linestyle="--", linewidth=1)
        if "x" in log:
            ax.set_xscale("log")
        if "y" in log:
            ax.set_yscale("log")
        if 1 < len(lines) < 4:
            ax.legend()
        elif len(lines) > 3:
            columns = 2 if len(panels) > 1 else 4 if len(lines) == 4 else 3
            _legend_below(ax, columns)
    axes[0].set_ylabel(ylabel)
    return figure


def points(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    *,
    xlabel: str,
    ylabel: str,
    mark: float,
    height: float = 3.3,
) -> Figure:
    """Draw panels of labelled points side by side, both axes logarithmic, the y axis shared.

    Args:
        panels: for each panel its title and its points, {title: {label: (x, y)}}.
        xlabel: label of the x axes.
        ylabel: label of the first y axis.
        mark: where on the y axes to draw a dashed line.
        height: height of the picture in inches.
    """
    figure, axes = _subplots(height, columns=len(panels), sharey=True)
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        for (label, (x, y)), marker in zip(groups.items(), "osD^v" * 3, strict=False):
            ax.plot(x, y, marker, label=label, ms=5, alpha=0.85)
        ax.axhline(mark, color=INK, linestyle="--", linewidth=1)
        ax.set(title=title, xlabel=xlabel, xscale="log", yscale="log")
        ticks = [tick for tick in (0.5, 1, 2, 3, 4, 6) if tick > ax.get_ylim()[0]]
        ax.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        ax.minorticks_off()
        ax.xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel(ylabel)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]))
    return figure


def matrices(panels: Mapping[str, ArrayLike], *, height: float = 3.2, bar: bool = False) -> Figure:
    """Draw matrices side by side, blue below zero and orange above, white at zero.

    Args:
        panels: {title: (rows, columns)}; a colour scale of its own for each.
        height: height of the picture in inches.
        bar: add a colour bar to each.
    """
    figure, axes = _subplots(height, columns=len(panels))
    colors = LinearSegmentedColormap.from_list("signed", [BLUE, "white", ORANGE])
    for ax, (title, matrix) in zip(axes, panels.items(), strict=True):
        matrix = np.asarray(matrix)
        top = np.abs(matrix).max()
        image = ax.imshow(matrix, cmap=colors, vmin=-top, vmax=top, interpolation="nearest")
        ax.set_title(title)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        if bar:
            figure.colorbar(image, ax=ax, shrink=0.8)
    _keep_width(figure)
    return figure


def images(panels: Mapping[str, ArrayLike], sequence: ArrayLike, xlabel: str) -> Figure:
    """Draw grey images in a row, and below them the first one as a sequence of numbers."""
    figure = plt.figure(figsize=(WIDTH, 3.3))
    plt.close(figure)
    grid = figure.add_gridspec(2, len(panels))
    for column, (title, image) in enumerate(panels.items()):
        ax = figure.add_subplot(grid[0, column])
        ax.imshow(image, cmap="Greys", interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
    ax = figure.add_subplot(grid[1, :])
    ax.step(range(len(sequence)), sequence, where="post", color=BLUE, ls="-")
    ax.set(xlabel=xlabel, ylabel="ink")
    ax.margins(x=0)
    return figure


def maze(
    walls: Sequence[str],
    paths: Mapping[str, Sequence[tuple[int, int]]],
    future: Sequence[tuple[int, int]],
) -> Figure:
    """Draw walks through a maze that meet in one cell, and the one walk that both take from there.

    Args:
        walls: rows of "#" (wall) and "." (floor).
        paths: the labelled walks, as cells (row, column); all end where `future` begins.
        future: the cells from there on.
    """
    rows, columns = len(walls), len(walls[0])
    figure, (ax,) = _subplots(2.9)
    for r, row in enumerate(walls):
        for c, cell in enumerate(row):
            if cell == "#":
                ax.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, color=PALE, ec=GREY, lw=0.4))
    for (label, cells), shift in zip(paths.items(), (-0.12, 0.12), strict=False):
        r, c = np.array(cells).T + shift
        (line,) = ax.plot(c, r, label=label, lw=2.4)
        ax.plot(c[0], r[0], "o", color=line.get_color(), ms=9)
    r, c = np.array(future).T
    ax.plot(c, r, label="both, from there on", lw=2.4)
    ax.plot(c[-1], r[-1], "s", color=TEAL, ms=9)
    ax.add_patch(Rectangle((c[0] - 0.5, r[0] - 0.5), 1, 1, fill=False, ec=INK, lw=2))
    ax.annotate(
        "the same state",
        (c[0], r[0] + 0.5),
        (c[0], rows - 0.1),
        ha="center",
        va="top",
        arrowprops={"arrowstyle": "-", "color": INK},
    )
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows + 0.35, -0.5), aspect="equal")
    ax.axis("off")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.6), fontsize=10.5)
    _keep_width(figure)
    return figure


def block_diagram() -> Figure:
    """Draw the block diagram of h' = A h + B x, y = C h + D x."""
    figure, (ax,) = _subplots(2.9)
    top, low = 1.75, 0.45
    _box(ax, (2.0, top), "$B$")
    _sum(ax, (3.3, top))
    _box(ax, (4.9, top), r"$\int$", color=ORANGE)
    _box(ax, (7.2, top), "$C$")
    _sum(ax, (8.5, top))
    _box(ax, (4.9, low), "$A$")
    _box(ax, (4.9, 2.95), "$D$", dashed=True)
    _arrow(ax, (0.5, top), (1.55, top), "$x(t)$", at=(0.15, top))
    _arrow(ax, (2.45, top), (3.13, top))
    _arrow(ax, (3.47, top), (4.45, top), "$h'(t)$", at=(3.95, top + 0.2))
    _arrow(ax, (5.35, top), (6.75, top), "$h(t)$", at=(6.0, top + 0.2))
    _arrow(ax, (7.65, top), (8.33, top))
    _arrow(ax, (8.67, top), (9.6, top), "$y(t)$", at=(9.95, top))
    _path(ax, [(6.3, top), (6.3, low), (5.35, low)])
    _path(ax, [(4.45, low), (3.3, low), (3.3, top - 0.17)])
    _path(ax, [(1.0, top), (1.0, 2.95), (4.45, 2.95)], dashed=True)
    _path(ax, [(5.35, 2.95), (8.5, 2.95), (8.5, top + 0.17)], dashed=True)
    ax.set(xlim=(-0.2, 10.3), ylim=(0, 3.4), aspect="equal")
    ax.axis("off")
    return figure


def crossing(t: ArrayLike, runs: Mapping[str, ArrayLike], at: tuple[float, float]) -> Figure:
    """Draw curves that meet in one marked point (time, position) and then part."""
    figure, (ax,) = _subplots(2.6)
    for label, run in runs.items():
        ax.plot(t, run, label=label)
    ax.plot(*at, "o", color=INK, ms=7, zorder=3)
    ax.axvline(at[0], color=GREY, lw=0.8, ls=":")
    ax.annotate("same position,\nother velocity", at, (12, 22), textcoords="offset points")
    ax.set(xlabel="time (s)", ylabel="position (m)")
    ax.margins(x=0)
    ax.legend(loc="upper right")
    return figure


def kicks(t: ArrayLike, responses: ArrayLike, total: ArrayLike) -> Figure:
    """Draw the fading responses (kicks, length) of a state to single kicks, and their sum."""
    figure, (ax,) = _subplots(2.8)
    responses = np.asarray(responses)
    ax.fill_between(t, np.sum(responses, axis=0), color=PALE)
    for i, response in enumerate(responses):
        label = "one kick each, fading" if i == 0 else None
        ax.plot(t, response, color=ORANGE, ls="--", lw=1.2, label=label)
    ax.plot(t, total, color=BLUE, ls="-", label="the state: their sum")
    ax.set(xlabel="time (s)", ylabel="$h(t)$")
    ax.margins(x=0)
    ax.legend(loc="upper left")
    return figure


def modes(
    rates: Sequence[float], frequencies: Sequence[float], mode: Callable[[complex], ArrayLike]
) -> Figure:
    """Draw Re e^{λt} as a small picture at the place of each λ in the complex plane."""
    figure, (ax,) = _subplots(3.9)
    width = 0.8 * min(np.diff(sorted(rates)))
    height = 0.62 * min(np.diff(sorted(frequencies)))
    ax.axvspan(min(rates) - width, 0, color=PALE, zorder=0)
    ax.axvline(0, color=GREY, lw=1)
    ax.axhline(0, color=GREY, lw=1)
    for rate in rates:
        for frequency in frequencies:
            response = np.asarray(mode(complex(rate, frequency)))
            x = rate + width * (np.linspace(0, 1, len(response)) - 0.5)
            color = BLUE if rate < 0 else (TEAL if rate == 0 else ORANGE)
            shown = response / np.abs(response).max()
            ax.plot(x, frequency + height / 2 * shown, color=color, ls="-", lw=1.3)
            ax.plot(rate, frequency, ".", color=INK, ms=3)
    ax.set(xlabel=r"Re $\lambda$  (how fast it grows or fades)")
    ax.set(ylabel=r"Im $\lambda$  (how fast it turns)")
    ax.set(xlim=(min(rates) - width, max(rates) + width))
    ax.set(xticks=rates, yticks=frequencies)
    for x, text in [(min(rates) / 2, "stable: fades"), (max(rates) / 2, "unstable: grows")]:
        ax.text(x, 1.02, text, transform=ax.get_xaxis_transform(), ha="center")
    return figure


def phase_planes(
    systems: Mapping[str, ArrayLike], trajectories: Mapping[str, ArrayLike], limit: float = 1.6
) -> Figure:
    """Draw the flow h' = A h of 2 × 2 systems, and trajectories (runs, length, 2) through it."""
    figure, axes = _subplots(2.75, columns=len(systems), sharey=True)
    grid = np.linspace(-limit, limit, 13)
    p, v = np.meshgrid(grid, grid)
    for ax, (title, A) in zip(axes, systems.items(), strict=True):
        dp, dv = np.einsum("ij,jkl->ikl", np.asarray(A), np.stack([p, v]))
        length = np.hypot(dp, dv) + 1e-9
        ax.quiver(p, v, dp / length, dv / length, color=GREY, alpha=0.55, scale=22, width=0.006)
        for run, color in zip(np.asarray(trajectories[title]), [BLUE, ORANGE], strict=False):
            ax.plot(run[:, 0], run[:, 1], color=color, ls="-", lw=1.4)
            ax.plot(*run[0], "o", color=color, ms=4)
        ax.set(title=title, xlabel="position", xlim=(-limit, limit), ylim=(-limit, limit))
        ax.set_aspect("equal")
    axes[0].set_ylabel("velocity")
    return figure


def staircase(
    t: ArrayLike, signal: ArrayLike, sample_times: ArrayLike, samples: ArrayLike
) -> Figure:
    """Draw a signal, its samples, and the staircase that holds each sample until the next."""
    figure, axes = _subplots(2.5, columns=3, sharey=True)
    titles = ["a signal", "is sampled", "and held"]
    for ax, title in zip(axes, titles, strict=True):
        ax.plot(t, signal, color=GREY, ls="-", lw=1, alpha=1 if title == "a signal" else 0.5)
        ax.set(title=title, xlabel="time (s)")
    axes[1].plot(sample_times, samples, "o", color=BLUE, ms=4)
    step = np.asarray(sample_times)[1] - np.asarray(sample_times)[0]
    held_times = np.append(sample_times, np.asarray(sample_times)[-1] + step)
    axes[2].plot(
        held_times, np.append(samples, np.asarray(samples)[-1]), drawstyle="steps-post", color=BLUE
    )
    axes[2].plot(sample_times, samples, "o", color=BLUE, ms=4)
    return figure


def one_step(
    t: ArrayLike, exact: ArrayLike, dt: float, steps: Mapping[str, float], start: float
) -> Figure:
    """Draw the exact path over one step, and where each rule's straight line lands."""
    figure, (ax,) = _subplots(2.9)
    ax.plot(t, exact, color=INK, ls="-", lw=2.2, label="exact (zero-order hold)")
    markers = {"forward Euler": "s", "bilinear": "D"}
    for (label, end), color in zip(steps.items(), [ORANGE, TEAL], strict=False):
        ax.plot([0, dt], [start, end], color=color, marker=markers[label], label=label)
    ax.axvline(dt, color=GREY, lw=0.8, ls=":")
    ax.set(xlabel="time", ylabel="$h$", xticks=[0, dt], xticklabels=["$0$", r"$\Delta$"])
    ax.legend(loc="upper right")
    return figure


def convergence(dt: ArrayLike, panels: Panels, exact: float = 1e-12) -> Figure:
    """Draw errors over the step on logarithmic axes, with the slopes for small steps.

    Errors below `exact` are rounding: they are named in the legend, and not drawn.
    """
    figure, axes = _subplots(3.4, columns=len(panels), sharey=True)
    for ax, (title, errors) in zip(axes, panels.items(), strict=True):
        for (label, error), marker in zip(errors.items(), ["o", "s", "D", "^"], strict=False):
            slope = np.polyfit(np.log(dt[-3:]), np.log(error[-3:]), 1)[0]
            rounding = max(error) < exact
            text = (
                f"{label}: exact, below the picture" if rounding else f"{label}: slope {slope:.1f}"
            )
            drawn = np.full(len(dt), np.nan) if rounding else error
            ax.loglog(dt, drawn, marker=marker, ms=4, label=text)
        ax.set(title=title, xlabel=r"step $\Delta$ (s)")
        ax.set_xticks(dt[::2], [f"{step:.3g}" for step in dt[::2]])
        ax.xaxis.set_minor_formatter(NullFormatter())
        _legend_below(ax, columns=1)
    axes[0].set_ylabel("largest error")
    return figure


def stability_regions(
    growth: Mapping[str, Callable[[np.ndarray], np.ndarray]], limit: float = 4.0
) -> Figure:
    """Shade where |R(z)| < 1, for each rule's growth factor R of a step z = Δ λ."""
    figure, axes = _subplots(3.0, columns=len(growth), sharey=True)
    # an even number of rows, so that none lies on the real axis, where a rule may divide by zero
    re, im = np.meshgrid(np.linspace(-limit, limit / 2, 601), np.linspace(-0.8, 0.8, 640) * limit)
    for ax, (title, factor) in zip(axes, growth.items(), strict=True):
        size = np.abs(factor(re + 1j * im))
        ax.contourf(re, im, size, levels=[0, 1], colors=[PALE])
        ax.contour(re, im, size, levels=[1], colors=[BLUE], linewidths=1.6)
        ax.contour(re, im, size, levels=[0.25, 0.5, 0.75], colors=[INK], linewidths=0.6)
        ax.axvline(0, color=INK, lw=0.7)
        ax.axhline(0, color=INK, lw=0.7)
        ax.set(title=title, xlabel=r"Re $\Delta\lambda$")
        ax.set_aspect("equal")
    axes[0].set_ylabel(r"Im $\Delta\lambda$")
    _keep_width(figure)
    return figure


def descent(
    grid: ArrayLike, loss: ArrayLike, paths: Mapping[str, tuple[ArrayLike, ArrayLike]], true: float
) -> Figure:
    """Draw a loss over Δ with the places that descents passed, and Δ over their iterations."""
    figure, (left, right) = _subplots(3.0, columns=2)
    left.loglog(grid, loss, color=GREY, ls="-", lw=1.2)
    for (label, (dt, losses)), marker in zip(paths.items(), ["o", "s", "D"], strict=False):
        (line,) = left.plot(dt, losses, marker=marker, ms=3, ls="none", label=label)
        right.semilogy(dt, label=label, color=line.get_color())
    left.axvline(true, color=INK, lw=0.8, ls=":")
    right.axhline(true, color=INK, lw=0.8, ls=":")
    left.set(xlabel=r"$\Delta$ (s)", ylabel="loss", title="where the descents pass")
    right.set(xlabel="iteration", ylabel=r"$\Delta$ (s)", title="how they get there")
    right.legend(loc="best")
    return figure


@dataclass(frozen=True, repr=False)
class Interactive:
    """A picture that the reader moves, drawn in the page by a few lines of JavaScript.

    Needs no network and no running kernel: all that it shows was computed before. Built by `slider`
    and `scan_steps`.

    Attributes:
        template: a file of the package, with {{data}} in the place of the data.
        data: what the template draws.
        name: what a reader without HTML sees.
    """

    template: str
    data: dict
    name: str

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _repr_html_(self) -> str:
        template = files("mamba_tutorial").joinpath(self.template).read_text(encoding="utf-8")
        return template.replace("{{data}}", json.dumps(self.data, separators=(",", ":")))


def slider(
    x: ArrayLike,
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
        x: (length,), the positions of the samples.
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
    return Interactive(
        "slider.html",
        {
            "x": _short(x),
            "fixed": {name: _short(curve) for name, curve in fixed.items()},
            "moving": {name: [_short(c) for c in curves] for name, curves in moving.items()},
            "label": label,
            "values": [_written(value) for value in values],
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
            "note": note,
        }
        for step, note in zip(steps, notes, strict=True)
    ]
    data = {"steps": drawn, "start": start, "description": description}
    return Interactive("stepper.html", data, f"a figure with a slider of {len(drawn)} steps")


def token_heat(
    lines: Sequence[tuple[Sequence[str], ArrayLike]], *, label: str, span: tuple[float, float]
) -> Figure:
    """Draw lines of tokens under heat maps of a quantity that each token has in several channels.

    Args:
        lines: for each line its tokens and the quantity, (channels, tokens).
        label: what the colour means.
        span: the values of the lightest and of the darkest colour, on a logarithmic scale.
    """
    figure, axes = _subplots(1.6 * len(lines) + 0.2, rows=len(lines))
    norm = LogNorm(*span, clip=True)
    for ax, (tokens, heat) in zip(axes, lines, strict=True):
        picture = ax.imshow(heat, aspect="auto", cmap=HEAT, norm=norm, interpolation="none")
        ax.set_xticks(range(len(tokens)), tokens, family="monospace", fontsize=9.5)
        ax.set(yticks=[], ylabel="channels")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, label=label, fraction=0.02, pad=0.01, extend="both")
    return figure


def text_heat(
    text: str, rows: Mapping[str, ArrayLike], *, label: str, span: tuple[float, float]
) -> Figure:
    """Draw a text several times, each time on a ground coloured by another quantity of its letters.

    Args:
        text: the letters; it is broken into two lines.
        rows: for each quantity its name and its values, (letters,).
        label: what the colour means.
        span: the values of the lightest and of the darkest colour, on a logarithmic scale.
    """
    figure, axes = _subplots(0.85 * len(rows) + 0.2, rows=len(rows))
    norm, width = LogNorm(*span, clip=True), len(text) // 2
    for ax, (name, values) in zip(axes, rows.items(), strict=True):
        grid = np.asarray(values)[: 2 * width].reshape(2, width)
        picture = ax.imshow(grid, aspect="auto", cmap=HEAT, norm=norm, interpolation="none")
        for i, letter in enumerate(text[: 2 * width]):
            row, column = divmod(i, width)
            color = "white" if norm(grid[row, column]) > 0.75 else INK
            place = {"ha": "center", "va": "center_baseline"}
            ax.text(column, row, letter, family="monospace", fontsize=10, color=color, **place)
        ax.set_title(name, fontsize=9.5)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, label=label, fraction=0.02, pad=0.01, extend="both")
    return figure


def mamba_block() -> Figure:
    """Draw a layer of Mamba: norm, the block's two branches, residual, and the sizes on the lines.

    One branch convolves and scans, the other gates.
    """
    figure, (ax,) = _subplots(3.7)
    low, middle, high, top, under = 0.95, 1.9, 2.85, 4.35, 0.15
    _box(ax, (1.5, middle), "norm", fontsize=11.0)
    _box(ax, (2.75, middle), r"$W_\mathrm{in}$")
    _box(ax, (4.25, high), "conv", fontsize=11.0)
    _box(ax, (5.45, high), "silu", fontsize=11.0)
    _box(ax, (8.2, high), "SSM", color=ORANGE, fontsize=11.0)
    _box(ax, (5.45, low), "silu", fontsize=11.0)
    _box(ax, (6.4, top), r"$W_x$", color=ORANGE)
    _box(ax, (8.2, top), r"$W_\Delta$", color=ORANGE)
    _box(ax, (10.5, middle), r"$W_\mathrm{out}$")
    _sum(ax, (9.5, middle), "×")
    _sum(ax, (11.5, middle))
    _arrow(ax, (0.0, middle), (1.07, middle), "$u$", at=(-0.25, middle))
    _path(ax, [(0.5, middle), (0.5, under), (11.5, under), (11.5, middle - 0.17)])
    _arrow(ax, (1.93, middle), (2.32, middle))
    _path(ax, [(3.18, middle), (3.45, middle), (3.45, high), (3.82, high)])
    _path(ax, [(3.45, middle), (3.45, low), (5.02, low)])
    _arrow(ax, (4.68, high), (5.02, high))
    _arrow(ax, (5.88, high), (7.77, high))
    _path(ax, [(6.4, high), (6.4, top - 0.33)], dashed=True)
    _arrow(ax, (6.83, top), (7.77, top), dashed=True)
    _arrow(ax, (8.2, top - 0.33), (8.2, high + 0.33), dashed=True)
    _path(ax, [(6.83, top - 0.2), (7.3, top - 0.2), (7.3, high + 0.2), (7.77, high + 0.2)], True)
    _path(ax, [(8.63, high), (9.5, high), (9.5, middle + 0.17)])
    _path(ax, [(5.88, low), (9.5, low), (9.5, middle - 0.17)])
    _arrow(ax, (9.67, middle), (10.07, middle))
    _arrow(ax, (10.93, middle), (11.33, middle))
    _arrow(ax, (11.67, middle), (12.4, middle))
    symbols = (
        ("$x$", 6.12, high + 0.2),
        ("$z$", 4.25, low + 0.2),
        ("$y$", 9.1, high + 0.2),
        (r"$\Delta$", 8.42, 3.6),
        ("$B, C$", 6.84, 3.72),
    )
    for text, *at in symbols:
        ax.text(*at, text, ha="center", va="center", fontsize=13)
    sizes = (
        ("d_model", 0.5, middle + 0.25),
        ("d_model", 12.05, middle + 0.25),
        ("d_inner", 2.95, high),
        ("d_inner", 2.95, low),
        ("d_inner", 9.05, 3.6),
        ("dt_rank", 7.3, top + 0.22),
        ("d_state", 6.84, 3.42),
        ("h: d_inner × d_state", 8.2, high - 0.52),
        ("the residual connection", 6.0, under + 0.2),
    )
    for text, *at in sizes:
        ax.text(*at, text, ha="center", va="center", fontsize=8.5, color=INK)
    ax.set(xlim=(-0.5, 12.5), ylim=(0.0, 4.75), aspect="equal")
    ax.axis("off")
    return figure


def s4_pipeline(Lambda: ArrayLike, roots: ArrayLike, spectrum: ArrayLike, kernel: ArrayLike):
    """Draw the four stations of S4's kernel: eigenvalues, roots of unity, spectrum, kernel.

    Args:
        Lambda: (n,), complex.
        roots: (length,), the roots of unity.
        spectrum: (length // 2 + 1,), the generating function at half of the roots.
        kernel: (length,).
    """
    figure, axes = _subplots(2.7, columns=4)
    Lambda, roots = np.asarray(Lambda), np.asarray(roots)
    titles = ("what is learned", "where it is asked", "what it answers", "what is wanted")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
        ax.tick_params(labelsize=8.5)
    axes[0].plot(Lambda.real, Lambda.imag, "o", color=BLUE, ms=3)
    axes[0].set(xlabel=r"$\Lambda$, with $P, B, \tilde C, \Delta$", xlim=(-1, 0.5), yscale="symlog")
    axes[0].axvline(0, color=GREY, lw=0.8)
    axes[1].plot(roots.real, roots.imag, "o", color=ORANGE, ms=2.5)
    axes[1].set(xlabel=r"the roots of unity $z_j$", aspect="equal", yticks=[-1, 0, 1])
    axes[2].plot(np.abs(spectrum), color=TEAL, ls="-")
    axes[2].set(xlabel=r"$|\hat K(z_j)|$ over $j$", yscale="log")
    axes[3].plot(kernel, color=BLUE, ls="-")
    axes[3].set(xlabel=r"$\bar K_l$ over $l$")
    for ax, step in zip(axes[1:], ("", "Cauchy\nsums →", "inverse\nFFT →"), strict=True):
        if step:
            ax.text(-0.3, 1.12, step, transform=ax.transAxes, ha="center", va="bottom", fontsize=9)
    return figure


def tensors(columns: Sequence[Mapping[str, ArrayLike]]) -> Figure:
    """Draw tensors from left to right, each number a square: blue below zero, orange above.

    Args:
        columns: what stands in each column, one below the other: {label: (n,) or (rows, n)}. A
            vector stands upright. Each tensor has a colour scale of its own.
    """
    colors = LinearSegmentedColormap.from_list("signed", [BLUE, "white", ORANGE])
    grids = [
        {label: np.atleast_2d(np.asarray(t).T).T for label, t in column.items()}
        for column in columns
    ]
    gap, room = 2.2, 3.4  # squares between two columns, and below each tensor for its label
    widths = [max(grid.shape[1] for grid in column.values()) for column in grids]
    heights = [sum(len(grid) + room for grid in column.values()) for column in grids]
    wide, high = sum(widths) + gap * len(widths), max(heights)
    figure, (ax,) = _subplots(WIDTH * high / wide)
    left = gap / 2
    for column, width, height in zip(grids, widths, heights, strict=True):
        top = (high - height) / 2
        for label, grid in column.items():
            rows, n = grid.shape
            x = left + (width - n) / 2
            scale = np.abs(grid).max() or 1.0
            extent = (x, x + n, top + rows, top)
            ax.imshow(grid / scale, cmap=colors, vmin=-1, vmax=1, extent=extent)
            for i in range(rows + 1):
                ax.plot([x, x + n], [top + i] * 2, color=GREY, lw=0.5, ls="-")
            for j in range(n + 1):
                ax.plot([x + j] * 2, [top, top + rows], color=GREY, lw=0.5, ls="-")
            ax.text(x + n / 2, top + rows + 0.3, label, ha="center", va="top", fontsize=9)
            top += rows + room
        left += width + gap
    ax.set(xlim=(0, wide), ylim=(high, -0.2), aspect="equal")
    ax.axis("off")
    return figure


def bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    xlabel: str,
    mark: float | None = None,
    unit: str = "",
    height: float | None = None,
) -> Figure:
    """Draw labelled bars, lying, in groups; a value that is NaN leaves its place empty.

    Args:
        groups: for each group its name and its bars, {name: {label: value}}; equal labels share a
            colour.
        xlabel: label of the axis.
        mark: where to draw a dashed line.
        unit: written behind each value.
        height: height of the picture in inches; by default what the bars need.
    """
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    colors = dict(zip(labels, [BLUE, ORANGE, TEAL, PLUM, GREY, INK] * 3, strict=False))
    places, ticks, y = [], {}, 0.0
    for name, group in groups.items():
        ticks[name] = y + (len(group) - 1) / 2
        places += [(y + i, label, value) for i, (label, value) in enumerate(group.items())]
        y += len(group) + 0.7
    figure, (ax,) = _subplots(height or 0.21 * y + 0.9)
    for label in labels:
        mine = [(at, value) for at, other, value in places if other == label]
        at, values = zip(*mine, strict=True)
        drawn = ax.barh(at, values, height=0.86, color=colors[label], label=label)
        texts = ["" if np.isnan(value) else f"{value:.3g}{unit}" for value in values]
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of the dashed line
        ax.bar_label(drawn, texts, padding=3, fontsize=8.5, bbox=clear)
    if mark is not None:
        ax.axvline(mark, color=INK, linestyle="--", linewidth=1)
    ax.set(xlabel=xlabel, yticks=list(ticks.values()), yticklabels=list(ticks))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.1)
    if len(labels) > 1:
        columns = len(labels) if len(labels) < 5 else 3
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns)
    return figure


def spread(
    panels: Panels, *, xlabel: str, log: bool = False, marks: Mapping[str, float] | None = None
) -> Figure:
    """Draw the results of several seeds: a dot for each and a bar at their mean, row by row.

    Args:
        panels: for each panel its title and its rows, {title: {label: results}}.
        xlabel: label of the x axes.
        log: make the x axes logarithmic where results differ by more than a factor of ten.
        marks: for a panel's title, where to draw a dashed line.
    """
    rows = max(map(len, panels.values()))
    figure, axes = _subplots(0.24 * rows + 0.9, columns=len(panels), sharey=len(panels) > 1)
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        for row, results in enumerate(groups.values()):
            results = np.asarray(results, dtype=float)
            ax.plot(results, np.full(len(results), row), "o", color=BLUE, ms=4.5, alpha=0.6)
            ax.plot(results.mean(), row, "|", color=ORANGE, ms=14, mew=2.2)
        if marks and title in marks:
            ax.axvline(marks[title], color=INK, linestyle="--", linewidth=1)
        ax.set(title=title, xlabel=xlabel, yticks=range(len(groups)), yticklabels=list(groups))
        ax.set_ylim(rows - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", color=PALE, linewidth=0.8)
        ax.set_axisbelow(True)
        values = np.concatenate([np.asarray(results) for results in groups.values()])
        if log and values.max() > 10 * values.min():
            ax.set_xscale("log")
    return figure


def memories(levels: Sequence[tuple[str, str, str]]) -> Figure:
    """Draw a chip's memories as boxes that grow as they get slower.

    Args:
        levels: from the nearest to the farthest, each its name, its size and its speed.
    """
    figure, (ax,) = _subplots(0.62 * len(levels) + 0.3)
    colors = [ORANGE, TEAL, BLUE, GREY, PLUM]
    for row, ((name, size, speed), color) in enumerate(zip(levels, colors, strict=False)):
        width, y = 1.2 + 0.9 * row, len(levels) - row
        box = Rectangle(
            (2.6 - width / 2, y), width, 0.62, facecolor=color, alpha=0.35, edgecolor=INK
        )
        ax.add_patch(box)
        ax.text(2.6, y + 0.31, size, ha="center", va="center", fontsize=9)
        ax.text(-0.3, y + 0.31, name, ha="right", va="center")
        ax.text(5.0, y + 0.31, speed, ha="left", va="center", fontsize=9.5)
        if row:
            _arrow(ax, (2.6, y + 0.64), (2.6, y + 0.98))
    ax.set(xlim=(-2.6, 9.2), ylim=(0.8, len(levels) + 0.8))
    ax.axis("off")
    return figure


def timelines(panels: Mapping[str, ArrayLike]) -> Figure:
    """Draw what warps do in each clock, (warps, clocks): 1 where one issues, 0 where it waits."""
    rows = [np.asarray(panel) for panel in panels.values()]
    figure = plt.figure(figsize=(WIDTH, 0.2 * sum(len(r) + 1 for r in rows) + 0.5 * len(rows)))
    plt.close(figure)
    axes = figure.subplots(len(rows), 1, height_ratios=[len(r) + 1 for r in rows], sharex=True)
    colors = LinearSegmentedColormap.from_list("busy", [PALE, BLUE])
    for ax, (title, warps) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        busy = np.asarray(warps).max(axis=0, keepdims=True)
        picture = np.concatenate([np.asarray(warps), 0 * busy, busy])
        ax.imshow(picture, aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="none")
        ax.axhspan(len(warps) - 0.5, len(warps) + 0.5, color="white")
        names = [f"warp {k}" for k in range(len(warps))]
        ax.set_yticks([*range(len(warps)), len(warps) + 1], [*names, "scheduler"], fontsize=8.5)
        ax.set_title(f"{title}: busy {100 * busy.mean():.0f} % of the time", fontsize=9.5)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    ax.set_xlabel("clocks")
    return figure


def register_tile() -> Figure:
    """Draw how a tile of the fused scan lies in a warp: 32 threads, each with its registers."""
    figure, (ax,) = _subplots(3.3)
    tokens, states = 8, 16
    for lane in range(12):
        color = ORANGE if lane == 2 else PALE
        ax.add_patch(
            Rectangle((lane * 0.42, 0), 0.36, 3.2, facecolor=color, edgecolor=GREY, lw=0.8)
        )
    ax.text(12 * 0.42 + 0.15, 1.6, "… 32", va="center")
    ax.text(2.4, 3.5, "a warp: one channel for each thread", ha="center")
    ax.text(1.02, -0.32, "this one", ha="center", color=ORANGE)
    left, width, height = 7.0, 0.19, 0.4
    for t in range(tokens):
        for n in range(states):
            corner = (left + n * width, 3.2 - (t + 1) * height)
            ax.add_patch(
                Rectangle(corner, width, height, facecolor="white", edgecolor=GREY, lw=0.6)
            )
    ax.add_patch(
        Rectangle((left, 3.2 - height), states * width, height, facecolor=ORANGE, alpha=0.35)
    )
    ax.text(left + states * width / 2, 3.5, "its registers: 16 states", ha="center")
    ax.text(left - 0.15, 1.6, "8 tokens", ha="right", va="center", rotation=90)
    _arrow(ax, (left + states * width + 0.25, 3.1), (left + states * width + 0.25, 0.1))
    ax.text(left + states * width + 0.4, 1.6, "the scan", va="center", rotation=-90)
    ax.set(xlim=(-0.2, 11.2), ylim=(-0.6, 3.9))
    ax.axis("off")
    return figure


def schedule(steps: Sequence[tuple[float, float, str]], *, xlabel: str) -> Figure:
    """Draw what is done when: one bar for each step, in their order from above.

    Args:
        steps: where each begins and ends, and what it is; equal kinds share a colour.
        xlabel: label of the x axis.
    """
    kinds = list(dict.fromkeys(kind for *_, kind in steps))
    figure, (ax,) = _subplots(0.11 * len(steps) + 1.4)
    for kind, color in zip(kinds, [BLUE, ORANGE, TEAL, PLUM], strict=False):
        mine = [(row, *step[:2]) for row, step in enumerate(steps) if step[2] == kind]
        rows, begins, ends = np.array(mine).T
        widths, lefts = np.abs(ends - begins), np.minimum(begins, ends)
        ax.barh(rows, widths, left=lefts, height=0.8, color=color, label=kind)
    ax.set(xlabel=xlabel, ylabel="one after the other", yticks=[])
    ax.invert_yaxis()
    ax.margins(x=0)
    _legend_below(ax, columns=2)
    return figure


def shared_channels() -> Figure:
    """Draw two warps that share 32 channels: what each holds, and what both take from one place."""
    figure, (ax,) = _subplots(3.4)
    lanes, left, width, height = 12, 2.6, 0.42, 1.1
    middle = left + (lanes * width) / 2
    bands = (
        (3.3, "Δ, Δ x", 0.45, BLUE),
        (1.9, "warp 0", height, PALE),
        (0.5, "warp 1", height, PALE),
    )
    for bottom, label, size, color in (*bands, (-0.6, "y", 0.45, BLUE)):
        for lane in range(lanes):
            corner = (left + lane * width, bottom)
            face = ORANGE if lane == 2 and color == PALE else color
            ax.add_patch(
                Rectangle(corner, width - 0.06, size, facecolor=face, edgecolor=GREY, lw=0.8)
            )
        ax.text(left - 0.2, bottom + size / 2, label, ha="right", va="center")
    right = left + lanes * width
    ax.text(right + 0.1, 2.45, "… 32 channels,", va="center")
    ax.text(right + 0.1, 2.05, "states 0 to 7", va="center")
    ax.text(right + 0.1, 1.05, "the same channels,", va="center")
    ax.text(right + 0.1, 0.65, "states 8 to 15", va="center")
    ax.text(right + 0.1, 3.5, "once for both", va="center")
    ax.text(right + 0.1, -0.4, "two halves, added up", va="center")
    _arrow(ax, (middle, 3.25), (middle, 3.05))
    _arrow(ax, (middle, 0.45), (middle, -0.1))
    ax.set(xlim=(0.6, 11.2), ylim=(-0.8, 4))
    ax.axis("off")
    return figure


def scan_levels() -> Figure:
    """Draw a scan of 16 numbers by four threads: own runs, totals over lanes, corrections."""
    figure, (ax,) = _subplots(3.6)
    rows = {
        "each thread its own run": 3.0,
        "the totals over the lanes": 1.7,
        "what came before": 0.4,
    }
    for label, y in rows.items():
        ax.text(-0.3, y + 0.25, label, ha="right", va="center")
        for i in range(16):
            x = i * 0.5 + (i // 4) * 0.4
            end = i % 4 == 3
            color = PALE if y > 2.5 else ("white" if y > 1 and not end else "#dbe7f4")
            if y < 1:
                color = "#bcd3ea"
            ax.add_patch(Rectangle((x, y), 0.44, 0.5, facecolor=color, edgecolor=GREY, lw=0.8))
            if y > 2.5 and not end:
                _arrow(ax, (x + 0.22, y + 0.62), (x + 0.72, y + 0.62))
            if y < 1 and i >= 4 and not end:
                last = (i // 4) * 2.4 - 0.4 - 0.24
                ax.plot([last, x + 0.22], [1.7, 0.9], color=ORANGE, lw=0.9, ls="-")
    for level, distance in enumerate((1, 2)):
        for thread in range(distance, 4):
            start, stop = (j * 2.4 + 1.72 for j in (thread - distance, thread))
            bow = f"arc3,rad={-0.22 - 0.08 * level}"
            ax.add_patch(
                FancyArrowPatch((start, 2.2), (stop, 2.2), connectionstyle=bow, color=BLUE,
                                arrowstyle="-|>", mutation_scale=10, lw=1.2)
            )  # fmt: skip
    ax.set(xlim=(-3.6, 9.5), ylim=(0.1, 4.0))
    ax.axis("off")
    return figure


def look_back() -> Figure:
    """Draw the steps that the 28th tile joins: of tiles, of groups, of groups of groups."""
    tile, group = 27, 4
    figure, (ax,) = _subplots(2.4)
    for level, label in enumerate(("tiles", "groups", "groups of groups")):
        width = group**level
        index = tile // width
        first = index - index % group  # of the larger group that the tile is in
        ax.text(-0.6, level + 0.3, label, ha="right", va="center")
        for i in range((tile + 1) // width):
            own, joined = level == 0 and i == tile, first <= i < index
            color = ORANGE if own else BLUE if joined else PALE
            corner, size = (i * width + 0.08, level), (width - 0.16, 0.6)
            ax.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor=GREY, lw=0.8))
    ax.set(xlim=(-8.5, tile + 1.5), ylim=(-0.2, 3))
    ax.axis("off")
    return figure


def _written(value: float) -> str:
    return (f"{value:.3g}" if value % 1 else f"{value:g}").replace("-", "−")


def _short(values: ArrayLike) -> list[float | None]:
    """Round to what a screen can show, to keep the page small; NaN becomes None."""
    return [None if np.isnan(v) else round(float(v), 3) for v in np.asarray(values)]


def _subplots(height: float, rows: int = 1, columns: int = 1, **shared) -> tuple[Figure, list]:
    """Return a figure of the page's width and its axes in one list.

    The figure is closed for pyplot at once. Otherwise a notebook shows it twice: once as the value
    of its cell, and once because it is open.
    """
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **shared)
    plt.close(figure)
    return figure, list(axes.flat)


def _legend_below(ax: Axes, columns: int):
    """Put the legend under the label of the x axis, where it covers no curve."""
    below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=columns)


def _keep_width(figure: Figure):
    """Keep the margins of a picture narrower than the text, which notebooks would cut away."""
    page = Rectangle((0, 0), 1, 1, transform=figure.transFigure, fill=False, linewidth=0)
    figure.add_artist(page)


def _box(
    ax: Axes,
    centre: tuple[float, float],
    text: str,
    color: str = BLUE,
    dashed: bool = False,
    fontsize: float = 14,
):
    x, y = centre
    box = FancyBboxPatch((x - 0.4, y - 0.3), 0.8, 0.6, boxstyle="round,pad=0.03,rounding_size=0.08")
    box.set(facecolor="white", edgecolor=color, linewidth=1.6, linestyle="--" if dashed else "-")
    ax.add_patch(box)
    ax.text(x, y, text, ha="center", va="center", fontsize=fontsize)


def _sum(ax: Axes, centre: tuple[float, float], sign: str = "+"):
    ax.add_patch(plt.Circle(centre, 0.17, facecolor="white", edgecolor=INK, linewidth=1.4))
    ax.text(*centre, sign, ha="center", va="center_baseline", fontsize=12)


def _arrow(ax: Axes, start, end, text: str = "", at=None, dashed: bool = False):
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(
        FancyArrowPatch(start, end, color=INK, lw=1.2, ls="--" if dashed else "-", **style)
    )
    if text:
        ax.text(*at, text, ha="center", va="center", fontsize=13)


def _path(ax: Axes, points: Sequence[tuple[float, float]], dashed: bool = False):
    """Draw a line through the points, with an arrow head at the last one."""
    *_, before, end = points
    ax.plot(*zip(*points[:-1], strict=True), color=INK, lw=1.2, ls="--" if dashed else "-")
    _arrow(ax, before, end, dashed=dashed)
