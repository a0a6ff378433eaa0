"""A released model: what it writes, and how well it predicts a text that everybody has.

`python -m mamba_tutorial.experiments checkpoint` fetches the smallest released model and its
tokenizer (once, some 520 MB, kept by huggingface_hub), and needs a network for that. The text is
the start of what `data.standard_library` holds out.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mamba_tutorial import data
from mamba_tutorial._check import check_library
from mamba_tutorial.mamba import MambaLM
from mamba_tutorial.training import environment

MODEL, TOKENIZER = "state-spaces/mamba-130m-hf", "EleutherAI/gpt-neox-20b"
PROMPT = "A state space model is"
BYTES, NEW_TOKENS, PIECE = 20_000, 30, 512


def record(folder: Path) -> dict:
    """Fetch the model, examine it, and write the result to `checkpoint.json` in the folder.

    Raises:
        OSError: the model or its tokenizer is not here and cannot be fetched.
    """
    model, tokenizer = fetch()
    text = data.standard_library()[1][:BYTES].numpy().tobytes().decode(errors="replace")
    ids = tokenizer.encode(text).ids
    result = {
        "command": "python -m mamba_tutorial.experiments checkpoint",
        "environment": environment(),
        "model": MODEL,
        "prompt": PROMPT,
        "continuation": written(model, tokenizer.encode(PROMPT).ids, tokenizer.decode),
        **price(model, torch.tensor(ids), len(text.encode())),
    }
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def fetch() -> tuple[MambaLM, object]:
    """Return the model and its tokenizer, from the cache or from the hub."""
    tokenizers = check_library("tokenizers", "checkpoints")
    try:
        tokenizer = tokenizers.Tokenizer.from_pretrained(TOKENIZER)
        return MambaLM.from_pretrained(MODEL).eval(), tokenizer
    except Exception as error:  # each layer of the hub's client has errors of its own
        needed = f"expected {MODEL} and {TOKENIZER} in the cache of huggingface_hub, or a network"
        raise OSError(f"no released model is here and none can be fetched: {needed}") from error


def written(model: MambaLM, prompt: list[int], decode: Callable[[list[int]], str]) -> str:
    """Return how the model goes on after the prompt, always with the likeliest token."""
    ids = model.generate(torch.tensor([prompt]), NEW_TOKENS, temperature=0)
    return decode(ids[0, len(prompt) :].tolist())


@torch.no_grad()
def price(model: MambaLM, ids: Tensor, size: int) -> dict[str, float]:
    """Return the perplexity of the tokens, (length,), and the bits for each of `size` bytes.

    The text is read once, in pieces, with the state handed on, so each token is predicted from all
    before it; the first one is not predicted. Perplexity is e to the mean of −log p.
    """
    state, nats = None, 0.0
    for first in tqdm(range(0, len(ids) - 1, PIECE), desc="reading", disable=None):
        piece = ids[first : first + PIECE + 1]
        logits, state = model.prefill(piece[None, :-1], state)
        loss = torch.nn.functional.cross_entropy(logits[0].float(), piece[1:], reduction="sum")
        nats += loss.item()
    predicted = len(ids) - 1
    return {
        "tokens": predicted,
        "perplexity": math.exp(nats / predicted),
        "bits_per_byte": nats / math.log(2) / size,
    }
