"""How long a selective scan must take on a GPU, counted before anything is written.

A pair is one token of one channel. What a kernel needs for each pair is counted here; how much of
it the chip can do in a clock is known, and for special functions and shared memory measured
(`mamba_tutorial.benchmark.units`); the quotient is a time that no kernel of this formulation can
beat.
"""

from dataclasses import dataclass

from mamba_tutorial.records import recorded

# instructions for a pair in the loops of the compiled kernels in Gluon, with 16 states, on an H100;
# a test compiles them and counts
COMPILED = {"forward": 144, "backward": 468}


@dataclass(frozen=True)
class GPU:
    """What a chip can do; the defaults are those of an NVIDIA H100 with 132 multiprocessors.

    Attributes:
        clock: clocks in a second.
        bandwidth: bytes that a copy moves in a second, read and written.
        multiprocessors: how many there are; the numbers below are of each.
        schedulers: instructions of a warp that begin in a clock.
        special: exponentials, reciprocals and the like in a clock.
        shared: numbers of 4 bytes that shared memory hands out or takes in, in a clock; twice as
            many if all lanes of a warp read the same 8 or 16 bytes.
    """

    clock: float
    bandwidth: float
    multiprocessors: int = 132
    schedulers: int = 4
    special: int = 16
    shared: int = 32


def recorded_gpu() -> GPU:
    """Return the chip of the book's records, with its clock and its bandwidth as measured."""
    record = recorded("gpu_recurrence")
    _, _, clock, _ = record["environment"]["nvidia_smi"].split(", ")
    copy = record["results"][0]["copy_tb_per_s"]
    return GPU(clock=1e6 * float(clock.split()[0]), bandwidth=1e12 * copy)


def floors(gpu: GPU, batch: int, length: int, d_inner: int, d_state: int = 16) -> dict[str, float]:
    """Return the least times of the forward pass in milliseconds, by what is counted.

    For bfloat16 inputs with gate, bias and softplus, and one exponential for each state.
    """
    pairs, chip = batch * length * d_inner, gpu.multiprocessors * gpu.clock / 1e3
    moved = 4 * 2  # x, Δ, z and y, of two bytes each; B and C are shared by all channels
    exponentials = d_state + 3  # the decays; one for the softplus, two for the gate
    instructions = 5 * d_state  # ΔA, its power, the input, two multiply-adds
    return {
        "bytes": 1e3 * moved * pairs / gpu.bandwidth,
        "exponentials": exponentials * pairs / (gpu.special * chip),
        "instructions": issued_ms(gpu, instructions, pairs),
        "shared memory": shared_ms(gpu, forward_words(d_state, d_state), pairs),
    }


def forward_words(d_state: int, states: int) -> float:
    """Return the numbers that go through shared memory for a pair, forward.

    All lanes of a warp read the same B and C, up to four numbers at once: each counts one half.

    Args:
        d_state: the states of a channel.
        states: how many of them a thread holds; the others are other threads'.
    """
    threads = d_state // states
    words = threads * 2 * _alike(states) + 3  # B, C for each thread; x, Δ, z from their copies
    if threads > 1:
        words += 2 + 2 * threads  # Δ and Δ x, computed once: in, and out for each thread
        words += 2 * threads  # the parts of y: in, and out
    return words


def backward_words(d_state: int, states: int, channels: int, tile: int = 8) -> float:
    """Return the numbers that go through shared memory for a pair, backward.

    All lanes of a warp read the same B and C, up to four numbers at once: each counts one half.

    Args:
        d_state: the states of a channel.
        states: how many of them a thread holds, of each of its channels.
        channels: the channels of a thread.
        tile: the tokens of a tile, of which a section has as many.
    """
    numbers = (1 - 1 / tile) * (_alike(states) + 2 * channels)  # forwards through the section
    numbers += 2 * (2 * _alike(states) + 3 * channels)  # forth and back through a tile
    numbers += 2 * 2 * states  # two sums over channels, in and out
    numbers += 3 * 2 * channels if states < d_state else 0  # three sums over states
    return numbers * d_state / (states * channels)


def _alike(numbers: int) -> float:
    """Return what it counts to read so many numbers that are the same for all lanes of a warp."""
    return numbers / 2 if numbers > 1 else 1.0


def backward_exponentials(d_state: int, tile: int = 8) -> float:
    """Return the special functions of a pair in the backward pass.

    Forwards through the section, but for its last tile, the decays and the softplus. In the tile
    the decays, those of its last token twice; the softplus, its slope (an exponential and a
    reciprocal), and the same two for the gate.
    """
    section = (1 - 1 / tile) * (d_state + 1)
    return section + (1 + 1 / tile) * d_state + 1 + 2 + 2


def backward_registers(states: int, channels: int, tile: int = 8) -> int:
    """Return the registers of a thread that hold a tile's states and decays, and what stays."""
    held = states * channels
    within = (2 * tile - 1) * held  # a state and a decay for each token, but for one decay
    return within + 3 * held + 16  # the state, A and its gradient; addresses and sums


def shared_ms(gpu: GPU, words: int | float, pairs: int) -> float:
    """Return the milliseconds in which shared memory hands out so many numbers for each pair."""
    return 1e3 * words * pairs / (gpu.shared * gpu.multiprocessors * gpu.clock)


def issued_ms(gpu: GPU, instructions: int | float, pairs: int) -> float:
    """Return the milliseconds in which schedulers issue so many instructions for each pair."""
    lanes = 32 * gpu.schedulers * gpu.multiprocessors
    return 1e3 * instructions * pairs / (lanes * gpu.clock)
