"""Looking back, in Triton: how programs with one tile of a recurrence each agree on the states.

What a tile does to a state is one step h ↦ product · h + end. Each program publishes the step of
its tile, waits for those of the tiles before it, and joins them to the state that its tile starts
from. So that nobody has to join thousands of steps, some tiles in a row make a group, and some
groups a group of the next level, whose steps are published too, by whoever completes them; beyond
the highest level the state itself is handed on. What is joined, and in which order, depends on the
place of a tile alone and never on who was first, so two runs give the same bits.
"""

from mamba_tutorial.kernels._triton import tl, triton

# Words are written with all bits flipped, so that memory full of zeros, which is the quickest to
# get, stands for a step that no arithmetic makes.
ABSENT = tl.constexpr(0)  # a word that nobody has written yet
NAN = tl.constexpr(~0x7FC000007FC00000)  # a step of NaN, as arithmetic makes it
IDENTITY = tl.constexpr(~0x3F80000000000000)  # the step h ↦ 1 · h + 0


@triton.jit
def join(a1, b1, a2, b2):
    """(a₁, b₁) ⊕ (a₂, b₂), the earlier on the left."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def pick(tile, here):
    """Return the row of a tile that `here` says, (1, …)."""
    return tl.sum(tl.where(here, tile, 0.0), axis=0, keep_dims=True)


@triton.jit
def publish(word_ptr, product, end, real):
    """Write a step as one word of 64 bits: whoever sees it sees all of it."""
    high, low = product.to(tl.int32, bitcast=True), end.to(tl.int32, bitcast=True)
    word = ~((high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF))
    word = tl.where(word == ABSENT, NAN, word)
    tl.atomic_xchg(word_ptr, word, real, sem="relaxed")


@triton.jit
def await_steps(words, words_ptr, wanted):
    """Return the steps in the words, once all that are wanted are there.

    Only those that are missing are read again: hundreds of programs that read
    everything over and over are in the way of those that they wait for.
    """
    while tl.max((words == ABSENT).to(tl.int32)) > 0:
        words = tl.load(words_ptr, wanted & (words == ABSENT), words, volatile=True)
    words = ~words
    product = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return product, words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def look_back(
    words_ptr, own, own_end, h0, tile, tiles, real, k,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Return the state before the tile, whose own step is (own, own_end), and publish that step.

    The words lie in LEVELS + 1 lists: steps of tiles, of groups, of groups of groups, …, and last
    the states after the largest groups. k: 0, …, GROUP − 1, as a column.
    """
    publish(words_ptr + tile * CHANNELS, own, own_end, real)
    # All first looks are under way before one is waited for.
    looks = ()
    list_ptr, index, count = words_ptr, tile, tiles
    for _ in tl.static_range(LEVELS):
        place = index % GROUP  # in its group: so many steps before it
        ptr = list_ptr + tl.multiple_of((index - place + k) * CHANNELS, [1, 1])
        wanted = (k < place) & real
        looks = looks + ((ptr, wanted, tl.load(ptr, wanted, IDENTITY, volatile=True)),)
        list_ptr += count * CHANNELS
        index, count = index // GROUP, tl.cdiv(count, GROUP)
    state_ptr, wanted = list_ptr + (index - 1) * CHANNELS, (index > 0) & real
    state = tl.load(state_ptr, wanted, IDENTITY, volatile=True)

    list_ptr, index, count = words_ptr, tile, tiles
    for level in tl.static_range(LEVELS):
        p, e = await_steps(looks[level][2], looks[level][0], looks[level][1])
        p, e = tl.associative_scan((p, e), 0, join)
        p, e = pick(p, k == GROUP - 1), pick(e, k == GROUP - 1)
        if level == 0:
            before, before_end = p, e
        else:
            before, before_end = join(p, e, before, before_end)
        list_ptr += count * CHANNELS
        index, count = index // GROUP, tl.cdiv(count, GROUP)
        if level < LEVELS - 1:
            if (tile + 1) % GROUP ** (level + 1) == 0:  # the last of its group
                group, group_end = join(before, before_end, own, own_end)
                publish(list_ptr + index * CHANNELS, group, group_end, real)
    _, state = await_steps(state, state_ptr, wanted)
    h = before * tl.where(index > 0, state, h0) + before_end
    if (tile + 1) % GROUP**LEVELS == 0:
        publish(list_ptr + index * CHANNELS, 0 * own, own * h + own_end, real)
    return h
