"""Tasks for a sequence model, as generators of batches: six synthetic ones, and text.

Each takes the size of a batch and a `torch.Generator`, so a seed fixes all data, and returns
(inputs, targets) of token ids, both (batch, length), int64. A target of `IGNORE` is not scored.
They are made on the generator's device: on a GPU a batch takes less time than a step of training.
"""

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from mamba_tutorial._check import check_is_tensor, check_length, check_memory, check_shape

IGNORE = -100  # what torch.nn.functional.cross_entropy ignores
NOISE, GO = 0, 1  # the tokens of the copying tasks that are no data; data are 2, …, vocab − 1

Batch = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]


def copying(
    batch: int, generator: torch.Generator, *, data: int, noise: int, vocab: int = 16
) -> Batch:
    """Remember what was seen at fixed places: `data` tokens, then noise, then say them again.

        input    d₁ d₂ … d_m  0 0 … 0  1  1  … 1
        target   –  –  …  –   – – … –  d₁ d₂ … d_m

    Each token comes back a fixed number of steps after it was seen. A linear time-invariant model
    can do that: it is a delay.

    Args:
        batch: the number of sequences.
        generator: the source of randomness; its device is that of the batch.
        data: how many tokens to remember, m.
        noise: how many noise tokens follow them.
        vocab: the number of token ids; the first two are the noise and the signal to recall.

    Raises:
        TypeError, ValueError: a size is not a positive whole number, or vocab is below 4.
    """
    return _recall(batch, generator, data, noise, vocab, scattered=False)


def selective_copying(
    batch: int, generator: torch.Generator, *, data: int, noise: int, vocab: int = 16
) -> Batch:
    """Remember what matters, wherever it is: the data tokens lie scattered in the noise.

        input    0 d₁ 0 0 d₂ 0 … d_m 0  1  1  … 1
        target   –  – – –  – – …  –  –  d₁ d₂ … d_m

    From the Mamba paper (Gu and Dao 2023, Section 4.1.1), which has 16 data tokens, a length of
    4096 and a vocabulary of 16. The arguments and errors are those of `copying`.
    """
    return _recall(batch, generator, data, noise, vocab, scattered=True)


def reciting(batch: int, generator: torch.Generator, *, data: int, vocab: int = 16) -> Batch:
    """Read a row of tokens, then say it again, each token after the one said before.

        input    d₁ d₂ … d_m  1  d₁ d₂ … d_{m−1}  0 …
        target   –  –  …  –   d₁ d₂ d₃ …   d_m    – …

    m is drawn for each sequence, from half of `data` to all of it, so the distance to what is asked
    for is not known beforehand; what was said last tells where to look. This is the copying of
    Jelassi et al. (2024), whose rows have letters and many lengths as well.

    Args:
        batch: the number of sequences.
        generator: the source of randomness; its device is that of the batch.
        data: the tokens of the longest row; a sequence has twice as many.
        vocab: the number of token ids; the first two are the filling and the signal to recite.

    Raises:
        TypeError, ValueError: a size is not a positive whole number, or vocab is below 4.
    """
    _check_given(generator, batch=(batch, 1), data=(data, 1), vocab=(vocab, 4))
    tokens = 2 + _randint(vocab - 2, (batch, data), generator)
    m = (data + 1) // 2 + _randint(data // 2 + 1, (batch, 1), generator)
    place = torch.arange(2 * data, device=generator.device).expand(batch, -1)
    read, said = place < m, (place - m).clamp(0, data - 1)
    inputs = tokens.gather(1, torch.where(read, place, said - 1).clamp(0, data - 1))
    inputs.masked_fill_(place == m, GO).masked_fill_(place >= 2 * m, NOISE)
    targets = tokens.gather(1, said).masked_fill(read | (place >= 2 * m), IGNORE)
    return inputs, targets


def induction_heads(
    batch: int, generator: torch.Generator, *, length: int, vocab: int = 16
) -> Batch:
    """Recall what came after a special token when it appears for the second time.

        input    a b c * d e f … *        target at the last place: d

    The special token is vocab − 1; it stands once at a random place and once at the end. Only the
    last place is scored. From the Mamba paper (Gu and Dao 2023, Section 4.1.2), trained at length
    256 with a vocabulary of 16.

    Raises:
        TypeError, ValueError: a size is not a positive whole number, length is below 3 or vocab
            below 3.
    """
    _check_given(generator, batch=(batch, 1), length=(length, 3), vocab=(vocab, 3))
    special = vocab - 1
    inputs = _randint(special, (batch, length), generator)
    place = _randint(length - 2, (batch, 1), generator)
    inputs.scatter_(1, place, special)
    inputs[:, -1] = special
    targets = torch.full_like(inputs, IGNORE)
    targets[:, -1] = inputs.gather(1, place + 1).squeeze(1)
    return inputs, targets


def associative_recall(
    batch: int, generator: torch.Generator, *, length: int, pairs: int, vocab: int = 8192
) -> Batch:
    """Recall the values of many keys: pairs of both at first, then each key once more.

        input    k₁ v₁ k₂ v₂ … k_m v_m  r … r k₂ r r r k₁ r …
        target   –  –  –  –  … –   –    – … – v₂ – – – v₁ – …

    Keys and values are distinct, from the lower and the upper half of the vocabulary; r are any
    tokens. A key comes back 2g tokens after the pairs with a probability in proportion to
    (g + 1)^−0.99, so most come back soon. This is MQAR, of Arora et al. (2023, "Zoology"), with the
    gaps of the code that goes with it, whose power is 0.01.

    Args:
        batch: the number of sequences.
        generator: the source of randomness; its device is that of the batch.
        length: of a sequence, at least 4 tokens for each pair.
        pairs: how many keys there are, m.
        vocab: the number of token ids, even; there are less than vocab/2 keys.

    Raises:
        TypeError, ValueError: a size is not a positive whole number, or does not fit the others.
    """
    sizes = {"batch": (batch, 1), "pairs": (pairs, 1), "vocab": (vocab, 4)}
    _check_given(generator, **sizes)
    _check_given(generator, length=(length, 4 * pairs))
    half = vocab // 2
    if vocab % 2 or pairs >= half:
        raise ValueError(f"vocab is {vocab}, expected an even number above {2 * pairs}")
    check_memory("vocab", vocab, batch * vocab)

    def some(count: int) -> Tensor:
        return _order(batch, count, generator)[:, :pairs]

    keys, values = 1 + some(half - 1), half + some(half)
    inputs = _randint(vocab, (batch, length), generator)
    inputs[:, : 2 * pairs] = torch.stack([keys, values], dim=-1).flatten(1)
    gaps = torch.arange(1, (length - 2 * pairs) // 2 + 1, device=generator.device)
    chances = (gaps**-0.99).expand(batch, -1)
    places = 2 * pairs + 2 * torch.multinomial(chances, pairs, generator=generator)
    inputs.scatter_(1, places, keys)
    return inputs, torch.full_like(inputs, IGNORE).scatter_(1, places, values)


def parity(batch: int, generator: torch.Generator, *, length: int) -> Batch:
    """Say at every place whether the ones so far are an odd number.

        input    1 0 1 1 0 …
        target   1 1 0 1 1 …

    Raises:
        TypeError, ValueError: a size is not a positive whole number.
    """
    _check_given(generator, batch=(batch, 1), length=(length, 1))
    bits = _randint(2, (batch, length), generator)
    return bits, bits.cumsum(dim=1) % 2


def next_token(
    batch: int, generator: torch.Generator, *, tokens: Integer[Tensor, " text"], length: int
) -> Batch:
    """Predict the next token at every place of a piece of text.

        input    t₀ t₁ … t_{L−1}
        target   t₁ t₂ … t_L

    Args:
        batch: the number of pieces.
        generator: the source of randomness: where the pieces begin.
        tokens: the text, on the generator's device.
        length: of the pieces, L.

    Raises:
        TypeError, ValueError: a size is not a positive whole number, or the text is too short or
            no row of whole numbers.
    """
    _check_given(generator, batch=(batch, 1), length=(length, 1))
    check_is_tensor("tokens", tokens)
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise TypeError(f"tokens has dtype {tokens.dtype}, expected whole numbers")
    check_shape("tokens", tokens, "text")
    if len(tokens) <= length:
        raise ValueError(f"tokens has length {len(tokens)}, expected more than {length}")
    starts = _randint(len(tokens) - length, (batch, 1), generator)
    pieces = tokens[starts + torch.arange(length + 1, device=generator.device)].long()
    return pieces[:, :-1], pieces[:, 1:]


def _recall(
    batch: int, generator: torch.Generator, data: int, noise: int, vocab: int, scattered: bool
) -> Batch:
    _check_given(generator, batch=(batch, 1), data=(data, 1), noise=(noise, 1), vocab=(vocab, 4))
    tokens = 2 + _randint(vocab - 2, (batch, data), generator)
    if scattered:
        places = _order(batch, data + noise, generator)[:, :data].sort(dim=1).values
    else:
        places = torch.arange(data, device=generator.device).expand(batch, -1)
    first = tokens.new_full((batch, data + noise), NOISE).scatter(1, places, tokens)
    go = tokens.new_full((batch, data), GO)
    targets = torch.cat([torch.full_like(first, IGNORE), tokens], dim=1)
    return torch.cat([first, go], dim=1), targets


def _randint(high: int, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(high, size, generator=generator, device=generator.device)


def _order(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Return a random order of `count` things for each sequence."""
    return torch.rand(batch, count, generator=generator, device=generator.device).argsort(dim=1)


def _check_given(generator: torch.Generator, **sizes: tuple[int, int]) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}, expected a torch.Generator")
    for name, (size, least) in sizes.items():
        check_length(size, name, least)
        check_memory(name, size, size)
