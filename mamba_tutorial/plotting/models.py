"""How the models are put together: block diagrams, and the way of S4's kernel."""

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.drawing import arrow, box, path, sum_sign
from mamba_tutorial.plotting.style import BLUE, GREY, INK, ORANGE, TEAL, subplots


def block_diagram() -> Figure:
    """Draw the block diagram of h' = A h + B x, y = C h + D x."""
    figure, (ax,) = subplots(2.9)
    top, low = 1.75, 0.45
    box(ax, (2.0, top), "$B$")
    sum_sign(ax, (3.3, top))
    box(ax, (4.9, top), r"$\int$", color=ORANGE)
    box(ax, (7.2, top), "$C$")
    sum_sign(ax, (8.5, top))
    box(ax, (4.9, low), "$A$")
    box(ax, (4.9, 2.95), "$D$", dashed=True)
    arrow(ax, (0.5, top), (1.55, top), "$x(t)$", at=(0.15, top))
    arrow(ax, (2.45, top), (3.13, top))
    arrow(ax, (3.47, top), (4.45, top), "$h'(t)$", at=(3.95, top + 0.2))
    arrow(ax, (5.35, top), (6.75, top), "$h(t)$", at=(6.0, top + 0.2))
    arrow(ax, (7.65, top), (8.33, top))
    arrow(ax, (8.67, top), (9.6, top), "$y(t)$", at=(9.95, top))
    path(ax, [(6.3, top), (6.3, low), (5.35, low)])
    path(ax, [(4.45, low), (3.3, low), (3.3, top - 0.17)])
    path(ax, [(1.0, top), (1.0, 2.95), (4.45, 2.95)], dashed=True)
    path(ax, [(5.35, 2.95), (8.5, 2.95), (8.5, top + 0.17)], dashed=True)
    ax.set(xlim=(-0.2, 10.3), ylim=(0, 3.4), aspect="equal")
    ax.axis("off")
    return figure


def mamba_block() -> Figure:
    """Draw a layer of Mamba: norm, the block's two branches, residual, and the sizes on the lines.

    One branch convolves and scans, the other gates.
    """
    figure, (ax,) = subplots(3.7)
    low, middle, high, top, under = 0.95, 1.9, 2.85, 4.35, 0.15
    box(ax, (1.5, middle), "norm", fontsize=11.0)
    box(ax, (2.75, middle), r"$W_\mathrm{in}$")
    box(ax, (4.25, high), "conv", fontsize=11.0)
    box(ax, (5.45, high), "silu", fontsize=11.0)
    box(ax, (8.2, high), "SSM", color=ORANGE, fontsize=11.0)
    box(ax, (5.45, low), "silu", fontsize=11.0)
    box(ax, (6.4, top), r"$W_x$", color=ORANGE)
    box(ax, (8.2, top), r"$W_\Delta$", color=ORANGE)
    box(ax, (10.5, middle), r"$W_\mathrm{out}$")
    sum_sign(ax, (9.5, middle), "×")
    sum_sign(ax, (11.5, middle))
    arrow(ax, (0.0, middle), (1.07, middle), "$u$", at=(-0.25, middle))
    path(ax, [(0.5, middle), (0.5, under), (11.5, under), (11.5, middle - 0.17)])
    arrow(ax, (1.93, middle), (2.32, middle))
    path(ax, [(3.18, middle), (3.45, middle), (3.45, high), (3.82, high)])
    path(ax, [(3.45, middle), (3.45, low), (5.02, low)])
    arrow(ax, (4.68, high), (5.02, high))
    arrow(ax, (5.88, high), (7.77, high))
    path(ax, [(6.4, high), (6.4, top - 0.33)], dashed=True)
    arrow(ax, (6.83, top), (7.77, top), dashed=True)
    arrow(ax, (8.2, top - 0.33), (8.2, high + 0.33), dashed=True)
    path(ax, [(6.83, top - 0.2), (7.3, top - 0.2), (7.3, high + 0.2), (7.77, high + 0.2)], True)
    path(ax, [(8.63, high), (9.5, high), (9.5, middle + 0.17)])
    path(ax, [(5.88, low), (9.5, low), (9.5, middle - 0.17)])
    arrow(ax, (9.67, middle), (10.07, middle))
    arrow(ax, (10.93, middle), (11.33, middle))
    arrow(ax, (11.67, middle), (12.4, middle))
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
    figure, axes = subplots(2.7, columns=4)
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
