"""Numbers at the axes as a reader would write them."""

from collections.abc import Sequence
from math import ceil, floor, log10

from matplotlib.axis import Axis
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def written(values: Sequence[float]) -> list[str]:
    """Write numbers, all in full if all lie between 0.0001 and a million, else as powers of ten."""
    sizes = [abs(value) for value in values if value]
    if not sizes or (min(sizes) > 0.99e-4 and max(sizes) < 1.01e6):
        return [f"{value:,.7g}".replace("-", "−") for value in values]
    return [_as_power(value) if value else "0" for value in values]


def _as_power(value: float) -> str:
    exponent = floor(log10(abs(value)) + 1e-9)
    digits = f"{value / 10.0**exponent:.3g}".replace("-", "−")
    power = "1" if exponent == 0 else f"10{str(exponent).translate(SUPERSCRIPTS)}"
    return {"1": power, "−1": f"−{power}"}.get(digits, f"{digits} · {power}")


def logarithmic(axis: Axis, most: int = 6, unit: str = ""):
    """Make an axis logarithmic, with about as many ticks as a reader wants.

    Args:
        axis: the x or y axis of some Axes that hold their data already.
        most: at most so many ticks.
        unit: of the numbers, written with its prefix (ms, µs) at each tick.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    ticks = spaced(*sorted(axis.get_view_interval()), most)
    axis.set_ticks(ticks, [EngFormatter(unit)(t) for t in ticks] if unit else written(ticks))
    decades = len(ticks) > 1 and abs(ticks[1] / ticks[0] - 10) < 1e-6
    axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=99) if decades else NullLocator())
    axis.set_minor_formatter(NullFormatter())


def spaced(low: float, high: float, most: int) -> list[float]:
    """Return round numbers for a logarithmic axis.

    Powers of ten, if need be only every other one; where they are too few, 1, 2 and 5 or 1 and 3 of
    each; within one power of ten, even steps.
    """
    first, last = log10(low) - 1e-9, log10(high) + 1e-9
    if last - first < 0.8:
        return even(low, high, most - 1)
    if last - first < 2:
        digits = (1, 2, 5) if 3 * (last - first) <= most else (1, 3)
        powers = [10.0**e for e in range(floor(first), ceil(last))]
        return [d * p for p in powers for d in digits if first <= log10(d * p) <= last]
    for step in (1, 2, 3, 4, 5, 10, 20, 50):
        exponents = range(ceil(first / step) * step, floor(last) + 1, step)
        if len(exponents) <= most:
            return [10.0**e for e in exponents]
    raise ValueError(f"no ticks from {low} to {high}")


def even(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at equal distances, as many as may be."""
    power = 10.0 ** floor(log10((high - low) / most))
    for step in (power * digit for digit in (1, 2, 2.5, 5, 10, 20)):
        first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
        if last - first < most:
            return [float(f"{step * i:.9g}") for i in range(first, last + 1)]
    raise ValueError(f"no ticks from {low} to {high}")
