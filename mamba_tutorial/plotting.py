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
        height: height of the picture in inches.
    """
    figure, axes = _subplots(height, columns=len(panels))
    x = np.asarray(x)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for (label, values), marker in zip(lines.items(), "osD^" * 3, strict=False):
            values = np.asarray(values)
            ax.plot(x[: len(values)], values, label=label, marker=marker if markers else "", ms=4)
        ax.set(title=title, xlabel=xlabel)
        if "x" in log:
            ax.set_xscale("log")
        if "y" in log:
            ax.set_yscale("log")
        if len(lines) > 1:
            ax.legend()
    axes[0].set_ylabel(ylabel)
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


def maze(walls: Sequence[str], paths: Mapping[str, Sequence[tuple[int, int]]]) -> Figure:
    """Draw a maze, given as rows of "#" (wall) and "." (floor), and labelled walks through it."""
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
    end = next(iter(paths.values()))[-1]
    ax.add_patch(Rectangle((end[1] - 0.5, end[0] - 0.5), 1, 1, fill=False, ec=INK, lw=2))
    ax.annotate(
        "the same state",
        (end[1], end[0] + 0.5),
        (end[1], rows - 0.1),
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


def convergence(dt: ArrayLike, panels: Panels) -> Figure:
    """Draw errors over the step on logarithmic axes, with the slopes for small steps."""
    figure, axes = _subplots(3.4, columns=len(panels), sharey=True)
    for ax, (title, errors) in zip(axes, panels.items(), strict=True):
        for (label, error), marker in zip(errors.items(), ["o", "s", "D", "^"], strict=False):
            slope = np.polyfit(np.log(dt[-3:]), np.log(error[-3:]), 1)[0]
            text = f"{label}, slope {slope:.1f}" if slope > 0.5 else f"{label}, exact"
            ax.loglog(dt, error, marker=marker, ms=4, label=text)
        ax.set(title=title, xlabel=r"step $\Delta$ (s)", ylim=(1e-16, 10))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.legend(loc="center right", bbox_to_anchor=(1.02, 0.32))
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
        inner = ax.contour(re, im, size, levels=[0.25, 0.5, 0.75], colors=[GREY], linewidths=0.6)
        ax.clabel(inner, fontsize=7, fmt="%g")
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
) -> Interactive:
    """Draw held signals as staircases, some fixed and some that move with a slider.

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
    """
    return Interactive(
        "slider.html",
        {
            "x": _short(x),
            "fixed": {name: _short(curve) for name, curve in fixed.items()},
            "moving": {name: [_short(c) for c in curves] for name, curves in moving.items()},
            "label": label,
            "values": [f"{value:.3g}" if value % 1 else f"{value:g}" for value in values],
            "notes": list(notes),
            "start": start,
            "xlabel": xlabel,
            "description": description,
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


def mamba_block() -> Figure:
    """Draw the Mamba block: two branches, one of which convolves and scans, one of which gates."""
    figure, (ax,) = _subplots(3.1)
    low, high = 0.7, 2.1
    stations = {"conv": 3.0, "silu": 4.35, "SSM": 5.9}
    _box(ax, (1.2, 1.4), r"$W_\mathrm{in}$")
    for name, x in stations.items():
        _box(ax, (x, high), name, color=ORANGE if name == "SSM" else BLUE, fontsize=11.5)
    _box(ax, (4.35, low), "silu", fontsize=11.5)
    _box(ax, (8.9, 1.4), r"$W_\mathrm{out}$")
    _box(ax, (5.9, 3.3), r"$\Delta,B,C$", color=ORANGE, dashed=True, fontsize=11.5)
    _sum(ax, (7.4, 1.4), "×")
    _arrow(ax, (0.2, 1.4), (0.77, 1.4), "$u$", at=(0.0, 1.4))
    _path(ax, [(1.63, 1.4), (2.05, 1.4), (2.05, high), (2.57, high)])
    _path(ax, [(2.05, 1.4), (2.05, low), (3.92, low)])
    _arrow(ax, (3.43, high), (3.92, high))
    _arrow(ax, (4.78, high), (5.47, high), "$x$", at=(5.28, high - 0.2))
    _path(ax, [(5.1, high), (5.1, 3.3), (5.47, 3.3)], dashed=True)
    _arrow(ax, (5.9, 2.97), (5.9, high + 0.33), dashed=True)
    _path(ax, [(6.33, high), (7.4, high), (7.4, 1.57)])
    _path(ax, [(4.78, low), (7.4, low), (7.4, 1.23)])
    _arrow(ax, (7.57, 1.4), (8.47, 1.4))
    _arrow(ax, (9.33, 1.4), (9.95, 1.4))
    for at, text in (
        ((2.9, low + 0.2), "$z$"),
        ((6.9, high + 0.2), "$y$"),
    ):
        ax.text(*at, text, ha="center", va="center", fontsize=13)
    ax.set(xlim=(-0.2, 10.1), ylim=(0.2, 3.75), aspect="equal")
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
    colors = dict(zip(labels, [BLUE, ORANGE, TEAL, PLUM, GREY] * 3, strict=False))
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
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(labels))
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
