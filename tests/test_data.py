"""The recorded signals, and what is said about them."""

import sys

import pytest
import torch

from mamba_tutorial import data


def test_electrocardiogram():
    signal, rate = data.electrocardiogram()
    assert signal.shape == (1024,)
    assert signal.dtype == torch.float64
    assert abs(signal.mean()) < 1e-9
    assert rate == 360.0


def test_the_hum_gives_the_rate_away():
    signal, rate = data.electrocardiogram()
    spectrum = torch.fft.rfft(signal * torch.hann_window(1024, periodic=False)).abs()
    frequency = rate * torch.arange(513) / 1024
    above = frequency > 52
    assert abs(frequency[above][spectrum[above].argmax()] - 60) < 0.5


def test_handwritten_digits():
    images, labels = data.handwritten_digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt.data", None)
    with pytest.raises(ImportError, match=r"pywt.data is not installed.*mamba-tutorial\[notebooks"):
        data.electrocardiogram()


def test_reference_text_is_long_and_held_out():
    train, test = data.reference_text()
    assert len(train) > 300_000
    assert abs(len(test) / len(train) - 1 / 19) < 0.001
    assert train.min() >= 0
    assert train.max() <= 255
    assert b'"assert"' in bytes(train[:2000].tolist())
    known, new = (bytes(part.tolist()).split(b"\n\n") for part in (train, test))
    assert not set(new[1:-1]) & set(known)  # no held-out paragraph can be looked up
