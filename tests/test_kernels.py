"""The pieces of the compiled loops, against numpy and scipy."""

import numba
import numpy as np
import pytest
import scipy.special

from mamba_tutorial.kernels import cpu


@numba.njit
def apply(z):
    """exp, exprel and its derivative, as the loops use them."""
    out = np.empty((3, len(z)), np.float32)
    for i in range(len(z)):
        e = cpu._exp(z[i])
        w = cpu._exprel(z[i], e)
        out[0, i], out[1, i], out[2, i] = e, w, cpu._exprel_slope(z[i], e, w)
    return out


def slope(z):
    """(e^z − exprel(z))/z in float64, by its series near 0."""
    series = sum((k + 1) * z**k / scipy.special.factorial(k + 2) for k in range(12))
    with np.errstate(all="ignore"):
        far = (np.exp(z) - scipy.special.exprel(z)) / z
    return np.where(abs(z) < 0.5, series, far)


def test_exp_and_exprel_to_float32_rounding():
    z = np.concatenate([-np.logspace(-8, 1.9, 20000), np.logspace(-8, 1.9, 20000), [0.0]])
    z = z.astype(np.float32)
    given = z.astype(np.float64)
    exact = np.exp(given), scipy.special.exprel(given), slope(given)
    for value, reference, digits in zip(apply(z), exact, (2, 6, 16), strict=True):
        error = np.abs(value / reference - 1).max() / np.finfo(np.float32).eps
        assert error < digits


def test_exp_at_its_ends_and_at_nan():
    low, high, nan = apply(np.array([-1e30, 1e30, np.nan], np.float32))[0]
    assert 0 < low < 2e-38
    assert 1e38 < high < np.inf
    assert np.isnan(nan)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_programs_are_shared_out_among_the_threads_of_pytorch(threads, monkeypatch):
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: threads)
    ranges = []
    cpu._run(lambda begin, end: ranges.append((begin, end)), 5)
    assert len(ranges) == (1 if threads == 1 else 5)
    assert sorted(p for begin, end in ranges for p in range(begin, end)) == list(range(5))
