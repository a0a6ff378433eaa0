"""Each picture can be drawn and read on a phone, and the slider holds what it was given."""

import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from matplotlib import font_manager
from matplotlib.text import Text

from mamba_tutorial import plotting
from mamba_tutorial.plotting import grids
from mamba_tutorial.plotting.style import legend_columns
from mamba_tutorial.plotting.svg import svg
from mamba_tutorial.plotting.ticks import even, spaced, written
from mamba_tutorial.scan import blelloch, trace

T = np.linspace(0, 1, 20)
PICTURES = {
    "time_series": lambda: plotting.time_series(T, {"a": {"u": T, "v": -T}, "b": {"w": T**2}}),
    "curves": lambda: plotting.curves(
        T,
        {"a": {"u": T + 1, "v": T[:5] + 1}},
        xlabel="x",
        ylabel="y",
        log="xy",
        markers=True,
        mark=0.5,
    ),
    "curves, stacked": lambda: plotting.curves(
        T, {"a": {"u": T, "v": 1 - T}, "b": {"w": T}}, xlabel="x", ylabel="y", stacked=True
    ),
    "curves, side by side": lambda: plotting.curves(
        T + 1,
        {"a": {"u": 1e-5 * T + 1e-6, "v": T + 1}, "b": {"w": T + 1, "x": T + 2}},
        xlabel="x",
        ylabel="y",
        log="y",
        unit="s",
    ),
    "points": lambda: plotting.points(
        {"a": {"u": (T + 1, T + 1), "v": (T[1:], 1 / T[1:])}, "b": {"u": (T + 1, T + 2)}},
        xlabel="x",
        ylabel="y",
        mark=1.0,
    ),
    "matrices": lambda: plotting.matrices({"a": np.eye(3), "b": -np.eye(2)}, bar=True),
    "images": lambda: plotting.images({"a": np.eye(3), "b": np.eye(3)}, T, "pixel"),
    "maze": lambda: plotting.maze(
        ["####", "#..#", "####"], {"a": [(1, 1), (1, 2)]}, future=[(1, 2), (1, 1)]
    ),
    "block_diagram": plotting.block_diagram,
    "crossing": lambda: plotting.crossing(T, {"up": T, "down": 1 - T}, at=(0.5, 0.5)),
    "kicks": lambda: plotting.kicks(T, [np.exp(-T), 0 * T], np.exp(-T)),
    "modes": lambda: plotting.modes([-1.0, 0.0, 1.0], [0.0, 5.0], lambda s: np.exp(s * T).real),
    "phase_planes": lambda: plotting.phase_planes({"a": -np.eye(2)}, {"a": np.ones((1, 5, 2))}),
    "staircase": lambda: plotting.staircase(T, T, T[::5], T[::5]),
    "one_step": lambda: plotting.one_step(T, T, 1.0, {"bilinear": 0.5}, start=0.0),
    "convergence": lambda: plotting.convergence(
        [1.0, 0.5, 0.25], {"a": {"first": [1.0, 0.5, 0.25], "exact": [1e-15] * 3}}
    ),
    "stability_regions": lambda: plotting.stability_regions({"euler": lambda z: 1 + z}),
    "token_heat": lambda: plotting.token_heat(
        [("abc", np.eye(3)), ("defg", np.ones((2, 4)))], label="Δ", span=(0.1, 1.0)
    ),
    "text_heat": lambda: plotting.text_heat("abcd", {"u": T[1:5]}, label="Δ", span=(0.1, 1.0)),
    "s4_pipeline": lambda: plotting.s4_pipeline(T - 1j, np.exp(1j * T), T[:11] + 1, T),
    "tensors": lambda: plotting.tensors([[{"a": T[:3]}], [{"b": np.eye(2), "c": T[:1]}]]),
    "mamba_block": plotting.mamba_block,
    "bars": lambda: plotting.bars(
        {"one": {"a": 1.0, "b": 2.0}, "two": {"a": float("nan")}}, xlabel="x", mark=1.5, unit=" s"
    ),
    "spread": lambda: plotting.spread(
        {"a": {"u": [0.1, 0.2], "v": [0.3]}, "b": {"u": [0.5], "v": [1.0]}},
        xlabel="x",
        log=True,
        marks={"a": 0.2},
    ),
    "spread, stretched": lambda: plotting.spread({"": {"u": [98, 60]}}, xlabel="x", best=100),
    "schedule": lambda: plotting.schedule(
        [(0.0, 2.0, "a"), (2.0, 0.0, "b"), (0.0, 1.0, "a")], xlabel="x"
    ),
    "memories": lambda: plotting.memories([("a", "1", "fast"), ("b", "2", "slow")]),
    "timelines": lambda: plotting.timelines({"a": np.eye(3), "b": np.ones((1, 3))}),
    "register_tile": plotting.register_tile,
    "shared_channels": plotting.shared_channels,
    "works_on": lambda: plotting.works_on({"a": (1, 1, 5, 0), "b": (8, 4, 16, 8)}),
    "spread, other rows": lambda: plotting.spread(
        {"a": {"u": T}, "b": {"v": T, "w": T + 1}}, xlabel="x"
    ),
    "scan_levels": plotting.scan_levels,
    "look_back": plotting.look_back,
    "descent": lambda: plotting.descent(T + 0.1, T + 0.1, {"a": (T + 0.1, T + 0.1)}, true=0.5),
}


def shown_texts(figure):
    figure.canvas.draw()
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


@pytest.mark.parametrize("name", PICTURES)
def test_draws_at_the_width_of_the_page(name):
    figure = PICTURES[name]()
    figure.canvas.draw()
    assert figure.get_figwidth() == plotting.WIDTH
    assert figure.axes
    assert not mpl.pyplot.get_fignums()


@pytest.mark.parametrize("name", PICTURES)
def test_type_is_one_and_can_be_read_on_a_phone(name):
    """9 pixels at least where the picture is 350 pixels wide; and nothing is cut off."""
    figure = PICTURES[name]()
    pixels = 350 / (72 * plotting.WIDTH)  # of a point
    for text in shown_texts(figure):
        assert text.get_fontsize() * pixels >= 9, text
        assert text.get_fontfamily()[0] == "Figure Sans", text
        box, page = text.get_window_extent(), figure.bbox
        if text.axes and not text.get_clip_on() and box.width:
            assert box.x0 > page.x0 - 1, text
            assert box.x1 < page.x1 + 1, text
            assert box.y0 > page.y0 - 3, text
            assert box.y1 < page.y1 + 3, text


def test_the_typeface_is_the_one_of_the_package():
    for style in ("normal", "italic"):
        wanted = font_manager.FontProperties(family="Figure Sans", style=style)
        path = font_manager.findfont(wanted, fallback_to_default=False)
        assert "plotting/fonts/FigureSans" in path.replace("\\", "/")


@pytest.mark.parametrize("name", PICTURES)
def test_drawings_are_light_and_the_same_each_time(name):
    drawing = svg(PICTURES[name]())
    root = ET.fromstring(drawing)
    assert root.get("viewBox").split()[2] == f"{72 * plotting.WIDTH:g}"
    assert "\n" not in drawing
    assert len(drawing) < 150_000
    assert drawing == svg(PICTURES[name]())
    used = re.findall(r'(?:href="|url\()#([\w-]+)', drawing)
    assert set(used) == set(re.findall(r' id="([^"]+)"', drawing))


def test_numbers_at_an_axis_are_all_of_one_kind():
    assert written([0.001, 1, 10_000]) == ["0.001", "1", "10,000"]
    assert written([1, 1e6]) == ["1", "1,000,000"]
    assert written([-0.5, 0, 2]) == ["−0.5", "0", "2"]
    assert written([1e-6, 1, 1e3, 3e4]) == ["10⁻⁶", "1", "10³", "3 · 10⁴"]


def test_ticks_are_round_and_few():
    assert even(-1.6, 2.9, 4) == [-1, 0, 1, 2]
    assert even(0, 47, 6) == [0, 10, 20, 30, 40]
    assert spaced(3.5e-6, 7.2e-6, 5) == pytest.approx([4e-6, 5e-6, 6e-6, 7e-6])
    assert spaced(0.3, 12, 6) == pytest.approx([0.5, 1, 2, 5, 10])
    assert spaced(1e-33, 1e40, 6) == pytest.approx([1e-20, 1, 1e20, 1e40])
    for low, high in ((1e-9, 3), (0.2, 700), (20, 30), (1, 1e6)):
        ticks = spaced(low, high, 6)
        assert 2 <= len(ticks) <= 6
        assert all(low <= a < b <= high * 1.0001 for a, b in pairwise(ticks))


def test_a_legend_is_as_wide_as_it_may_be():
    assert legend_columns(["a", "b", "c"]) == 3
    assert legend_columns(["a" * 30, "b" * 30, "c" * 30, "d"]) == 2
    assert legend_columns(["a" * 60, "b"]) == 1


def test_letters_can_be_read_on_every_colour():
    def luminance(color):
        return np.dot((0.2126, 0.7152, 0.0722), np.where(
            color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4))  # fmt: skip

    for share in np.linspace(0, 1, 101):
        color = np.array(grids.HEAT(share)[:3])
        lights = luminance(color), float(grids._readable_on(color) == "white")
        assert (max(lights) + 0.05) / (min(lights) + 0.05) > 4.5


def test_a_stretched_axis_shows_the_results_themselves():
    (ax,) = PICTURES["spread, stretched"]().axes
    shown = {round(t.get_position()[0]): t.get_text() for t in ax.get_xticklabels()}
    assert shown[5] == "95"
    assert shown[20] == "80"
    assert ax.xaxis_inverted()


def test_convergence_names_the_slopes():
    figure = PICTURES["convergence"]()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["first: slope 1.0", "exact: exact"]
    assert all(
        line.get_ydata()[0] > 1e-12 or line.get_label() != "first" for line in figure.axes[0].lines
    )


def test_slider_holds_its_data_and_asks_for_nothing():
    widget = plotting.slider(
        range(3),
        {"tokens": [1, 2, 3]},
        {"state": [[0, 1, 2], [3, 4, np.nan]]},
        label="Δ",
        values=[0.1, 1.0],
        notes=["small", "large"],
        start=1,
        xlabel="token",
        description="a test",
    )
    html = widget._repr_html_()
    data = json.loads(re.search(r'application/json">(.*?)</script>', html, re.S)[1])
    assert data["moving"] == {"state": [[0.0, 1.0, 2.0], [3.0, 4.0, None]]}
    assert data["values"] == ["0.1", "1"]
    assert data["xticks"] == [[0.0, "0"], [1.0, "1"], [2.0, "2"]]  # tokens have no halves
    assert data["yticks"] == [[0.0, "0"], [1.0, "1"], [2.0, "2"], [3.0, "3"], [4.0, "4"]]
    assert not re.search(r"(src|href)\s*=", html)
    assert repr(widget) == "<Δ: a figure with a slider of 2 steps>"


def test_a_slider_goes_over_names_too():
    moving = {"this": [[1, 1], [2, 2]]}
    words = {"label": "n", "notes": ["a", "b"], "xlabel": "kind", "description": "a test"}
    widget = plotting.slider(["4×2", "2×4"], {}, moving, values=[1, 2], start=0, **words)
    assert widget.data["xticks"] == [[0, "4×2"], [1, "2×4"]]


def test_panels_with_the_same_rows_stand_side_by_side_others_one_above_the_other():
    beside = plotting.spread({"a": {"u": T}, "b": {"u": T + 1}}, xlabel="x")
    above = plotting.spread({"a": {"u": T}, "b": {"v": T, "w": T}}, xlabel="x", best=2.0)
    shapes = [[ax.get_subplotspec().get_geometry()[:2] for ax in f.axes] for f in (beside, above)]
    assert shapes == [[(1, 2)] * 2, [(2, 1)] * 2]
    assert all(ax.xaxis_inverted() for ax in above.axes)  # towards the best, at the right
    assert [ax.get_xlabel() for ax in above.axes] == ["", "x"]


def test_stepper_holds_the_steps_and_asks_for_nothing():
    steps = trace(blelloch, 4)
    figure = plotting.scan_steps(
        steps, [f"note {i}" for i in range(len(steps))], start=1, description=""
    )
    html = figure._repr_html_()
    data = json.loads(re.search(r'application/json">(.*?)</script>', html, re.S)[1])
    assert data["steps"][1]["joined"] == [[0, 1, 1], [2, 3, 3]]
    assert data["steps"][4]["joined"] == [[3, 1, 3]]
    assert data["steps"][-1]["intervals"] == [[0, 1], [0, 2], [0, 3], [0, 4]]
    assert data["notes"][2] == "note 2"
    assert not re.search(r"(src|href)\s*=", html)
    assert repr(figure) == f"<a figure with a slider of {len(steps)} steps>"
