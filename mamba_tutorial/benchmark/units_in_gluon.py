"""Kernels that keep one unit of a multiprocessor busy, and say for how many clocks they did.

Each warp notes the clock before and after its loop. What it computes is stored as well: so nothing
can be left out, and it can be checked.
"""

from mamba_tutorial.kernels._triton import gl, gluon

AT_ONCE = gl.constexpr(8)  # reads of a warp that are under way together


@gluon.jit
def _clock(after):
    """Return the clock of the multiprocessor for each number of `after`, once that is known."""
    return gl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l,f", [after], gl.int64, is_pure=False, pack=1
    )


@gluon.jit
def _note(clocks_ptr, result_ptr, began, result):
    """Store of each warp when it began, when it had its result, and that result."""
    warp = gl.program_id(0) * gl.num_warps()
    warp += gl.arange(0, gl.num_warps(), layout=result.type.layout)
    gl.store(clocks_ptr + 2 * warp, began)
    gl.store(clocks_ptr + 2 * warp + 1, _clock(result))
    gl.store(result_ptr + warp, result)


@gluon.jit
def exponentials(clocks_ptr, result_ptr, steps, PAIRS: gl.constexpr):
    """Iterate x ← 2^(−x), which leads to 0.641…, for four registers of a thread at a time.

    Args:
        clocks_ptr: (programs, warps, 2), int64.
        result_ptr: (programs, warps), the largest x of each warp.
        steps: how often.
        PAIRS: a register holds two numbers in float16, instead of one in float32.
    """
    SIZE: gl.constexpr = 8 if PAIRS else 4
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, SIZE], [1, 32], [gl.num_warps(), 1], [1, 0])
    zeros = gl.zeros([gl.num_warps(), 32 * SIZE], gl.float32, LAYOUT)
    began = _clock(gl.max(zeros, 1))
    x = zeros.to(gl.float16) if PAIRS else zeros
    for _ in range(steps):
        if PAIRS:
            x = gl.inline_asm_elementwise(
                "neg.f16x2 $0, $1; ex2.approx.f16x2 $0, $0;", "=r,r", [x], gl.float16, True, 2
            )
        else:
            x = gl.inline_asm_elementwise(
                "neg.f32 $0, $1; ex2.approx.ftz.f32 $0, $0;", "=f,f", [x], gl.float32, True, 1
            )
    _note(clocks_ptr, result_ptr, began, gl.max(x.to(gl.float32), 1))


@gluon.jit
def reads(clocks_ptr, result_ptr, steps, PIECE: gl.constexpr, SHARED: gl.constexpr):
    """Add up ones from shared memory, AT_ONCE · steps + 1 pieces in each lane.

    Args:
        clocks_ptr: (programs, warps, 2), int64.
        result_ptr: (programs, warps), the sum of each warp; lanes that share are counted once.
        steps: how often AT_ONCE pieces are read.
        PIECE: the numbers of 4 bytes that a lane reads with one instruction.
        SHARED: all lanes read the same piece, instead of each its own.
    """
    WIDTH: gl.constexpr = PIECE if SHARED else 32 * PIECE
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, PIECE], [1, 32], [WARPS, 1], [1, 0])
    # every other warp's pieces change places in twos, which hinders no bank; if all numbers lay in
    # order, the compiler would take the instruction that loads a matrix
    TURNS: gl.constexpr = gl.SwizzledSharedLayout(PIECE, 1, 1 if SHARED else 2, [1, 0])
    ones = gl.full([WARPS, WIDTH], 1.0, gl.float32, LAYOUT)
    rows = gl.allocate_shared_memory(gl.float32, [AT_ONCE + 1, WARPS, WIDTH], TURNS)
    for k in gl.static_range(AT_ONCE + 1):
        rows.index(k).store(ones)
    total = rows.index(0).load(LAYOUT)  # here all warps wait until the ones are there
    began = _clock(gl.sum(total, 1))
    for i in range(steps):
        for k in gl.static_range(AT_ONCE):
            # rows that change from step to step: else they would be read before the loop
            total += rows.index(i % 2 + k).load(LAYOUT)
    _note(clocks_ptr, result_ptr, began, gl.sum(total, 1))
