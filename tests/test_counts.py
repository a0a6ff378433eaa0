"""The counts against their sums by hand, and against what is known of the chip."""

import pytest

from mamba_tutorial import counts

GPU = counts.GPU(clock=2e9, bandwidth=3e12)


def test_floors_of_the_reference_shape_by_hand():
    pairs = 8 * 2048 * 2048
    floor = counts.floors(GPU, 8, 2048, 2048)
    assert floor["bytes"] == pytest.approx(8 * pairs / 3e12 * 1e3)
    assert floor["exponentials"] == pytest.approx(19 * pairs / (132 * 16 * 2e9) * 1e3)
    assert floor["instructions"] == pytest.approx(80 * pairs / (132 * 128 * 2e9) * 1e3)
    assert floor["shared memory"] == pytest.approx(19 * pairs / (132 * 32 * 2e9) * 1e3)


def test_floors_grow_with_every_size():
    small = counts.floors(GPU, 1, 64, 128, 8)
    for other in ((2, 64, 128, 8), (1, 128, 128, 8), (1, 64, 256, 8)):
        assert counts.floors(GPU, *other) == pytest.approx({k: 2 * v for k, v in small.items()})
    more = counts.floors(GPU, 1, 64, 128, 16)
    assert more["bytes"] == small["bytes"]
    assert all(more[key] > small[key] for key in ("exponentials", "instructions", "shared memory"))


def test_words_by_hand():
    assert counts.forward_words(16, 16) == 16 + 3
    assert counts.forward_words(16, 8) == 16 + 3 + 2 + 4 + 4
    assert counts.forward_words(16, 1) == 32 + 3 + 2 + 32 + 32  # alone, a number counts as one
    assert counts.backward_words(16, 16, 1) == pytest.approx(7 / 8 * 10 + 2 * 19 + 64)
    assert counts.backward_words(16, 4, 2) == pytest.approx(2 * (7 / 8 * 6 + 2 * 10 + 16 + 12))
    assert counts.shared_ms(GPU, 32 * 132, 2_000_000) == pytest.approx(1.0)
    assert counts.issued_ms(GPU, 128 * 132, 2_000_000) == pytest.approx(1.0)


def test_exponentials_and_registers_by_hand():
    assert counts.backward_exponentials(16) == pytest.approx(7 / 8 * 17 + 23)
    assert counts.backward_registers(4, 2) == 120 + 24 + 16
    assert counts.backward_registers(4, 4) > 255  # does not fit
