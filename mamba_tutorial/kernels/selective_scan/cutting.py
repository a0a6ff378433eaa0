"""Into how many chunks the length is cut, by a model of the time.

More chunks are more programs, and each of them is sooner done; but those that share a scheduler, of
which a multiprocessor has four, share its time as well, and what the chunks give has to be joined.
In units of what a warp of `ends` takes for a tile, chunks of `tiles` tiles take

    tiles · Σ weight · warps on a scheduler + JOIN · ⌈other chunks / 4⌉,

summed over the kernels that go through the length. Where a kernel comes in several forms, the one
soonest done counts. (Where `ends` does a chunk in two parts there are twice as many to join, which
is neglected.) The weights, and the time to join four chunks, were fitted to times on an H100.
"""

from functools import lru_cache
from typing import NamedTuple

from mamba_tutorial.kernels._triton import triton

TILE = 16  # tokens
SCHEDULERS = 4  # of a multiprocessor
ALONE = 1.25  # a warp alone on its scheduler takes the time of so many, for it waits for itself
JOIN = 1.5  # four chunks, which are fetched at once
CROWD = 16  # warps of a multiprocessor, at most, where the length is cut, or else two programs
LONG = 256  # tokens of a chunk, from which on `ends` is chosen from its forms


class Kernel(NamedTuple):
    """One that goes through the length."""

    programs: int  # for each chunk
    warps: int  # of a program
    weight: float  # the time of a warp for a tile

    def share(self, chunks: int, multiprocessors: int) -> float:
        """Return the time for a tile of each program."""
        each = triton.cdiv(self.programs * chunks, multiprocessors)
        return self.weight * max(ALONE, triton.cdiv(each * self.warps, SCHEDULERS))


def soonest(forms: tuple[Kernel, ...], chunks: int, multiprocessors: int) -> Kernel:
    """Return the form of a kernel that is soonest done."""
    return min(forms, key=lambda form: form.share(chunks, multiprocessors))


def of_ends(forms: tuple[Kernel, ...], chunk: int, chunks: int, multiprocessors: int) -> Kernel:
    """Return the form of `ends` that is soonest done; the first, if chunks are short."""
    return soonest(forms if chunk >= LONG else forms[:1], chunks, multiprocessors)


@lru_cache
def chunk_length(
    length: int,
    step: int,
    kernel: tuple[Kernel, ...],
    ends: tuple[Kernel, ...],
    multiprocessors: int,
) -> int:
    """Return the tokens of a chunk, a multiple of `step`; where it takes least, the longest.

    `ends` has nothing to do if there is but one chunk.
    """

    def time(chunk: int) -> float:
        chunks = triton.cdiv(length, chunk)
        used = [soonest(kernel, chunks, multiprocessors)]
        if chunks > 1:
            used.append(of_ends(ends, chunk, chunks, multiprocessors))
        share = sum(each.share(chunks, multiprocessors) for each in used)
        tiles = triton.cdiv(min(chunk, length), TILE)
        return tiles * share + JOIN * triton.cdiv(chunks - 1, 4)

    steps = triton.cdiv(length, step)
    crowd = max(2, CROWD // kernel[0].warps) * multiprocessors
    most = max(1, min(steps, crowd // kernel[0].programs))
    return min((triton.cdiv(steps, chunks) * step for chunks in range(1, most + 1)), key=time)
