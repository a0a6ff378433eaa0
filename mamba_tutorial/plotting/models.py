"""How the models are put together: block diagrams, and the way of S4's kernel."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.drawing import arrow, box, path, sum_sign
from mamba_tutorial.plotting.style import BLUE, GREY, ORANGE, TEAL, subplots
from mamba_tutorial.plotting.ticks import logarithmic, written


def block_diagram() -> Figure:
    """Draw the block diagram of h' = A h + B x, y = C h + D x."""
    figure, (ax,) = subplots(2.3)
    top, low = 1.75, 0.45
    box(ax, (2.0, top), "$B$")
    sum_sign(ax, (3.3, top))
    box(ax, (4.9, top), "∫", color=ORANGE)
    box(ax, (7.2, top), "$C$")
    sum_sign(ax, (8.5, top))
    box(ax, (4.9, low), "$A$")
    box(ax, (4.9, 2.95), "$D$", dashed=True)
    arrow(ax, (0.5, top), (1.55, top), "$x(t)$", at=(0.1, top))
    arrow(ax, (2.45, top), (3.13, top))
    arrow(ax, (3.47, top), (4.45, top), "$h$′$(t)$", at=(3.95, top + 0.25))
    arrow(ax, (5.35, top), (6.75, top), "$h(t)$", at=(6.0, top + 0.25))
    arrow(ax, (7.65, top), (8.33, top))
    arrow(ax, (8.67, top), (9.6, top), "$y(t)$", at=(10.0, top))
    path(ax, [(6.3, top), (6.3, low), (5.35, low)])
    path(ax, [(4.45, low), (3.3, low), (3.3, top - 0.17)])
    path(ax, [(1.0, top), (1.0, 2.95), (4.45, 2.95)], dashed=True)
    path(ax, [(5.35, 2.95), (8.5, 2.95), (8.5, top + 0.17)], dashed=True)
    ax.set(xlim=(-0.3, 10.4), ylim=(0, 3.4), aspect="equal")
    ax.axis("off")
    return figure


def mamba_block() -> Figure:
    """Draw a layer of Mamba: norm, the block's two branches, residual, and the sizes on the lines.

    One branch convolves and scans, the other gates. The layer goes from the top to the bottom, so
    that words find room beside its lines.
    """
    figure, (ax,) = subplots(5.2)
    gate, middle, memory, low = 2.2, 3.9, 5.6, 2.2  # three columns, and where branches meet
    box(ax, (middle, 8.0), "norm")
    box(ax, (middle, 7.1), r"$W_\mathrm{in}$")
    box(ax, (memory, 5.8), "conv")
    box(ax, (memory, 4.95), "silu")
    box(ax, (memory, 3.3), "SSM", color=ORANGE)
    box(ax, (gate, 5.8), "silu")
    box(ax, (8.5, 4.35), "$W_x$", color=ORANGE)
    box(ax, (10.6, 4.35), r"$W_\Delta$", color=ORANGE)
    box(ax, (middle, 1.35), r"$W_\mathrm{out}$")
    sum_sign(ax, (middle, low), "×")
    sum_sign(ax, (middle, 0.5))
    arrow(ax, (middle, 8.95), (middle, 8.33))
    arrow(ax, (middle, 7.67), (middle, 7.43))
    path(ax, [(middle, 6.77), (middle, 6.45), (memory, 6.45), (memory, 6.13)])
    path(ax, [(middle, 6.45), (gate, 6.45), (gate, 6.13)])
    arrow(ax, (memory, 5.47), (memory, 5.28))
    arrow(ax, (memory, 4.62), (memory, 3.63))
    path(ax, [(memory, 4.35), (8.07, 4.35)], dashed=True)
    arrow(ax, (8.93, 4.35), (10.17, 4.35), dashed=True)
    path(ax, [(8.5, 4.02), (8.5, 3.45), (6.03, 3.45)], dashed=True)
    path(ax, [(10.6, 4.02), (10.6, 3.12), (6.03, 3.12)], dashed=True)
    path(ax, [(memory, 2.97), (memory, low), (middle + 0.17, low)])
    path(ax, [(gate, 5.47), (gate, low), (middle - 0.17, low)])
    arrow(ax, (middle, low - 0.17), (middle, 1.68))
    arrow(ax, (middle, 1.02), (middle, 0.67))
    arrow(ax, (middle, 0.33), (middle, -0.2))
    path(ax, [(middle, 8.65), (0.8, 8.65), (0.8, 0.5), (middle - 0.17, 0.5)])
    _name_lines(ax, middle)
    ax.set(xlim=(0.1, 11.2), ylim=(-0.25, 9.05), aspect="equal")
    ax.axis("off")
    return figure


def _name_lines(ax: Axes, middle: float):
    """Write on the lines of a layer what runs through them: its symbol, and how many numbers."""
    for text, x, y in (
        ("$u$: d_model", middle + 0.2, 8.85),
        ("$z$: d_inner", 2.4, 4.9),
        ("d_model", middle + 0.2, 0.0),
        ("memory $h$: d_inner × d_state", 5.8, 2.55),
        ("$y$", 4.6, 2.4),
    ):
        ax.text(x, y, text, ha="left", va="center")
    ax.text(5.4, 4.1, "$x$: d_inner", ha="right", va="center")
    ax.text(7.25, 3.7, "$B$, $C$: d_state", ha="center", va="center")
    ax.text(8.4, 2.88, r"$\Delta$: d_inner", ha="left", va="center")
    ax.text(9.55, 4.6, "dt_rank", ha="center", va="center")
    ax.text(0.5, 4.6, "the residual connection", ha="center", va="center", rotation=90)


def s4_pipeline(Lambda: ArrayLike, roots: ArrayLike, spectrum: ArrayLike, kernel: ArrayLike):
    """Draw the four stations of S4's kernel: eigenvalues, roots of unity, spectrum, kernel.

    Args:
        Lambda: (n,), complex.
        roots: (length,), the roots of unity.
        spectrum: (length // 2 + 1,), the generating function at half of the roots.
        kernel: (length,).
    """
    figure, axes = subplots(5.2, 2, 2)
    Lambda, roots = np.asarray(Lambda), np.asarray(roots)
    titles = (
        "1 What is learned",
        "2 Where it is asked",
        "3 Cauchy sums: the answers",
        "4 Inverse FFT: the kernel",
    )
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
    axes[0].plot(Lambda.real, Lambda.imag, "o", color=BLUE, ms=3, clip_on=False)
    axes[0].set(xlabel="Λ, beside P, B, C and Δ", xlim=(-1, 0.5), yscale="symlog")
    axes[0].set_yticks(ticks := [-1000, -10, 0, 10, 1000], written(ticks))
    axes[0].axvline(0, color=GREY, lw=0.8)
    axes[1].plot(roots.real, roots.imag, "o", color=ORANGE, ms=2.5, clip_on=False)
    axes[1].set(xlabel="the roots of unity $z_j$", aspect="equal")
    axes[1].set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    axes[2].plot(np.abs(spectrum), color=TEAL, ls="-")
    axes[2].set(xlabel=r"$|\hat K(z_j)|$ over $j$")
    logarithmic(axes[2].yaxis, 4)
    axes[3].plot(kernel, color=BLUE, ls="-")
    axes[3].set(xlabel=r"$\bar K_l$ over $l$")
    return figure
