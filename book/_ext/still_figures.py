"""Figures that move stand still without JavaScript: as they are before anybody moves them.

The scripts `curves.js` and `steps.js` of the package draw in the browser what they are given as
JSON. Here the first state of each is drawn once more, for browsers that run no scripts.
"""

import json
import re
from html import escape

FIGURE = re.compile(
    r"<noscript>[^<]*</noscript>(\s*<script type=\"application/json\">(.*?)</script>)",
    re.DOTALL,
)


def still(match: re.Match) -> str:
    """Return what stands in the place of the note that JavaScript is needed."""
    data = json.loads(match[2])
    drawn, key = step(data) if "steps" in data else curves(data)
    label = escape(data["description"], quote=True)
    start = data["start"]
    words = f"{data['label']} {data['values'][start]}. {data['notes'][start]}"
    svg = f'<svg viewBox="0 0 640 262" role="img" aria-label="{label}">{drawn}</svg>'
    return f'<noscript><div class="key">{key}</div>{svg}<p>{escape(words)}</p></noscript>{match[1]}'


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    """Return a text of the figure."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def curves(data: dict) -> tuple[str, str]:
    """Draw curves: the drawing, and its key."""
    moving = {name: states[data["start"]] for name, states in data["moving"].items()}
    everything = [
        *data["fixed"].values(),
        *(c for s in data["moving"].values() for c in s),
    ]
    values = [value for curve in everything for value in curve if value is not None]
    low, high = min(values), max(values)
    width = 590 / data["length"]

    def y(value):
        return 214 - 206 * (value - low) / (high - low)

    def path(curve):
        pen, parts = "M", []
        for i, value in enumerate(curve):
            if value is None:
                pen = "M"
                continue
            x = 42 + (i + 0.5 * data["smooth"]) * width
            stair = "" if data["smooth"] else f"h{width:.2f}"
            parts.append(f"{pen}{x:.1f} {y(value):.1f}{stair}")
            pen = "L"
        return "".join(parts)

    drawn, key = "", ""
    for value, label in data["yticks"]:
        drawn += f'<line x1="42" x2="632" y1="{y(value):.1f}" y2="{y(value):.1f}" />'
        drawn += text(34, y(value) + 5, label, "end")
    for place, label in data["xticks"]:
        drawn += text(42 + (place + 0.5) * width, 235, label)
    drawn += text(337, 257, data["xlabel"])
    for kinds, group in (
        (("still", "still dashed"), data["fixed"]),
        (("moving", "moving second"), moving),
    ):
        for i, (name, curve) in enumerate(group.items()):
            kind = kinds[min(i, 1)]
            dashes = ' stroke-dasharray="6 4"' if "dashed" in kind else ""
            drawn += f'<path class="{kind}" d="{path(curve)}"{dashes} />'
            key += f'<span class="{kind}">{escape(name)}</span>'
    return drawn, key


def step(data: dict) -> tuple[str, str]:
    """Draw one step of a scan: the drawing, and its key (it has none)."""
    now = data["start"]
    after, before = data["steps"][now], data["steps"][max(0, now - 1)]
    places = len(after["intervals"])
    pitch = 600 / places
    cell = min(11, (pitch - 8) / places)

    def x(place):
        return 20 + (place + 0.5) * pitch

    def row(intervals, top, changed):
        drawn = ""
        for place, (first, stop) in enumerate(intervals):
            for i in range(places):
                kind = ("new" if changed(place) else "held") if first <= i < stop else ""
                left = x(place) + (i - places / 2) * cell
                size = f'width="{cell - 1:.1f}" height="20"'
                drawn += f'<rect class="{kind}" x="{left:.1f}" y="{top}" {size} />'
            names = {0: "identity", 1: f"{first}"}
            drawn += text(x(place), top + 36, names.get(stop - first, f"{first}…{stop - 1}"))
        return drawn

    drawn = ""
    if now:
        drawn += row(before["intervals"], 24, lambda place: False)
        for left, right, to in after["joined"]:
            for kind, start in (("operand early", left), ("operand", right)):
                drawn += (
                    f'<line class="{kind}" x1="{x(start):.1f}" y1="66" x2="{x(to):.1f}" y2="170" />'
                )
    drawn += row(
        after["intervals"],
        176,
        lambda place: now and after["intervals"][place] != before["intervals"][place],
    )
    return drawn, ""


def draw_stills(app, pagename, templatename, context, doctree) -> None:
    """Put the still figures into a page."""
    context["body"] = FIGURE.sub(still, context.get("body", ""))


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", draw_stills)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
