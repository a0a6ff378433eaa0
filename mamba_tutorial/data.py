"""What the chapters start from: signals, images and text that ship inside libraries.

Nothing is downloaded.
"""

import importlib
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mamba_tutorial._check import check_library


def electrocardiogram() -> tuple[Float[Tensor, " samples"], float]:
    """Return an electrocardiogram of 1024 samples and its sampling rate.

    The recording is `pywt.data.ecg` of PyWavelets, which gives neither unit nor rate. The rate
    returned, 360 Hz, is an inference: the mains hum in the recording sits at one sixth of the
    sampling rate, and American mains hum at 60 Hz (chapter 1 shows it). The MIT-BIH Arrhythmia
    Database (Moody and Mark 2001) was recorded at that rate.

    Returns:
        The signal, float64, in the recorder's units with their mean removed, and the rate in Hz.

    Raises:
        ImportError: PyWavelets is not installed.
    """
    signal = torch.as_tensor(check_library("pywt.data", "notebooks").ecg(), dtype=torch.float64)
    return signal - signal.mean(), 360.0


def handwritten_digits() -> tuple[Float[Tensor, "images rows columns"], Int[Tensor, " images"]]:
    """Return 1797 images of handwritten digits and the digits they show.

    The test part of the "Optical Recognition of Handwritten Digits" data set of the UCI repository
    (Alpaydin and Kaynak 1998), as `sklearn.datasets.load_digits` ships it: 8 × 8 pixels, each the
    number of ink dots (0 to 16) in a 4 × 4 square of the original.

    Returns:
        The images, float32 between 0 and 1, and the labels, int64.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    digits = check_library("sklearn.datasets", "notebooks").load_digits()
    return torch.as_tensor(digits.images).float() / 16, torch.as_tensor(digits.target).long()


def reference_text() -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """Return the reference manual of the Python language as bytes: to learn from, and held out.

    The text of `help("for")` and its like, which Python brings along in `pydoc_data.topics`; so its
    length differs a little between versions of Python. Topics quote each other, so a paragraph that
    has come before is left out, lest the held-out text be found in the other. The held-out text is
    the last twentieth.

    Returns:
        Two runs of byte values, 0 to 255, int64.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = "\n\n".join(topics[name].strip() for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs)).encode()
    values = torch.tensor(list(text))
    return values[: -(len(text) // 20)], values[-(len(text) // 20) :]


def standard_library() -> tuple[UInt8[Tensor, " train"], UInt8[Tensor, " test"]]:
    """Return the source of Python's standard library as bytes: to learn from, and held out.

    Every module there is as a file, but for tests, in the order of their names; so the text differs
    between versions of Python. Every twentieth file is held out.

    Returns:
        Two runs of byte values, 0 to 255, uint8.
    """
    home = Path(importlib.import_module("os").__file__).parent
    spared = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    found = sorted(home.rglob("*.py"))
    parts = [path.read_bytes() for path in found if not spared & set(path.relative_to(home).parts)]
    learned = bytearray().join(part for k, part in enumerate(parts) if k % 20)
    held_out = bytearray().join(parts[::20])
    return tuple(torch.frombuffer(text, dtype=torch.uint8) for text in (learned, held_out))
