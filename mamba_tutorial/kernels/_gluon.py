"""What the kernels in Gluon share.

Plain Triton decides by itself which thread holds which number. Gluon is the same compiler with that
choice, the layout, written down. Where measurements say that it is worth it, a kernel is in Gluon.
It has no interpreter, so each such kernel has a twin in plain Triton, for everything else; tests on
a GPU hold both to the definition.
"""

from types import FunctionType

from torch import Tensor

from mamba_tutorial.kernels import _gates
from mamba_tutorial.kernels._launch import generation
from mamba_tutorial.kernels._triton import async_copy, gl, gluon, triton


def in_gluon(*functions: triton.JITFunction) -> list[triton.JITFunction]:
    """Return functions written for Triton, of one module, for Gluon; there they call one another.

    In the interpreter, which Gluon does not have, nothing can be called.
    """
    plain = [function.fn for function in functions]
    scope = plain[0].__globals__ | {"tl": gl}
    for function in plain:
        copy = FunctionType(function.__code__, scope, function.__name__)
        copy.__annotations__ = function.__annotations__
        scope[function.__name__] = gluon.jit(copy)
    return [scope[function.__name__] for function in plain]


softplus, sigmoid, mark, carry = in_gluon(
    _gates.softplus, _gates.sigmoid, _gates.mark, _gates.carry
)


def runs_on(*tensors: Tensor | None) -> bool:
    """Say whether tiles of these can be copied 16 bytes at a time, on Ampere or later.

    Neighbours along the last axis must be neighbours in memory.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return all(generation(tensor) >= (8, 0) and aligned(tensor) for tensor in given)


def aligned(tensor: Tensor) -> bool:
    """Say whether all rows along the last axis start at multiples of 16 bytes."""
    starts = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    return not any(start % 16 for start in (tensor.data_ptr(), *starts))


@gluon.jit
def below(index, count, ALWAYS: gl.constexpr):
    """Return index < count; where it always holds, a condition that the compiler drops."""
    return index >= 0 if ALWAYS else index < count


@gluon.jit
def words_of(begins, slot, like, TILE: gl.constexpr):
    """Return where sequences begin in a tile, four tokens a word (`mark`); if unknown, nothing.

    begins: None, or [STAGES · TILE / 4, 1, …]; like: a tensor of the layout that is wanted.
    """
    words = ()
    if begins is not None:
        for i in gl.static_range(TILE // 4):
            words = words + (begins.index(slot * (TILE // 4) + i).load(like.type.layout),)
    return words


@gluon.jit
def decay(step, A2, words, k: gl.constexpr):
    """Return 2^(step A2) of a tile's k-th token, of A2's layout; 0 where a sequence begins."""
    exponent = step * A2
    if len(words) > 0:
        exponent += mark(words[k // 4], k)
    return gl.exp2(exponent)


@gluon.jit
def fetch(buffer, ptr, low, high, stride, columns):
    """Begin to copy a tile into the buffer, in pieces of 16 bytes, the largest there are.

    Rows that are shorter are one piece. Rows outside [low, high), and pieces beyond the last
    column, become zero.
    """
    ROWS: gl.constexpr = buffer.shape[0]
    COLUMNS: gl.constexpr = buffer.shape[1]
    WHOLE: gl.constexpr = 128 // buffer.dtype.primitive_bitwidth
    PIECE: gl.constexpr = WHOLE if WHOLE < COLUMNS else COLUMNS
    LANES: gl.constexpr = 32 if COLUMNS > 32 * PIECE else COLUMNS // PIECE
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, PIECE], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0]
    )
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    inside = ((r >= low) & (r < high))[:, None] & (c // PIECE * PIECE < columns)
    at = gl.multiple_of(
        ptr + r[:, None] * stride + c, [1, PIECE * buffer.dtype.primitive_bitwidth // 8]
    )
    async_copy.async_copy_global_to_shared(buffer, at, mask=inside)


@gluon.jit
def order(buffers, ptrs, strides, columns, first, stop, slot, COUNT: gl.constexpr):
    """Begin to copy one tile of each of COUNT inputs: the rows from `first` on, before `stop`.

    Zeros where there are no such rows, so also if `first` is negative.
    """
    start = gl.maximum(first, 0).to(gl.int64)
    high = gl.where(first < 0, 0, stop - first)
    for i in gl.static_range(COUNT):
        buffer = buffers[i].index(slot)
        fetch(buffer, ptrs[i] + start * strides[i], 0, high, strides[i], columns[i])
    async_copy.commit_group()


@gluon.jit
def _pairs(tensors, HALF: gl.constexpr):
    joined = ()
    for i in gl.static_range(HALF):
        joined = joined + (gl.join(tensors[i], tensors[i + HALF]),)
    return joined


@gluon.jit
def stack(tensors, COUNT: gl.constexpr):
    """Put COUNT tensors, 2 to 16 and a power of two, side by side along new last axes of size 2.

    Nothing moves: they lie in the registers of the same threads as before.
    """
    for level in gl.static_range(4):
        if COUNT >> (level + 1) > 0:
            tensors = _pairs(tensors, COUNT >> (level + 1))
    return tensors[0]
