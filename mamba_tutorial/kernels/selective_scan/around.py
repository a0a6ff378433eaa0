"""What the selective scan needs before and after: copies, and sums of parts, one kernel each."""

from mamba_tutorial.kernels._triton import tl, triton


@triton.jit
def prepare(
    A_ptr, B_ptr, C_ptr, turned_ptr, b_ptr, c_ptr, zeros_ptr,
    rows, length, d_inner, d_state, zeros, B_batch, B_row, C_batch, C_row,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """B and C in float32, without gaps; after them A turned; and after it zeros, ZEROS each."""
    n, blocks = tl.arange(0, BLOCK_N)[None, :], tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    others = blocks + tl.cdiv(d_inner, ROWS)
    if program < blocks:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside, at = (row < rows) & (n < d_state), row * d_state + n
        sequence, token = row // length, row % length
        B = tl.load(B_ptr + sequence * B_batch + token * B_row + n, inside)
        C = tl.load(C_ptr + sequence * C_batch + token * C_row + n, inside)
        tl.store(b_ptr + at, B.to(tl.float32), inside)
        tl.store(c_ptr + at, C.to(tl.float32), inside)
    elif program < others:
        d = ((program - blocks) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (d < d_inner) & (n < d_state)
        A = tl.load(A_ptr + d * d_state + n, inside)
        tl.store(turned_ptr + n * d_inner + d, A.to(tl.float32), inside)
    elif zeros_ptr is not None:
        at = (program - others).to(tl.int64) * ZEROS + tl.arange(0, ZEROS)
        tl.store(zeros_ptr + at, tl.zeros([ZEROS], tl.float32), at < zeros)


@triton.jit
def add_up(
    shared_ptr, own_ptr, first_ptr, second_ptr, shared_parts, own_parts, first_size, second_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Two sums of parts, each in the order of the parts."""
    blocks = tl.cdiv(first_size, BLOCK)
    if tl.program_id(0) < blocks:
        _add(shared_ptr, first_ptr, tl.program_id(0), shared_parts, first_size, BLOCK)
    else:
        _add(own_ptr, second_ptr, tl.program_id(0) - blocks, own_parts, second_size, BLOCK)


@triton.jit
def _add(parts_ptr, total_ptr, block, parts, size, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(parts, loop_unroll_factor=8):
        total += tl.load(parts_ptr + at, at < size, 0.0)
        parts_ptr += size
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), at < size)
