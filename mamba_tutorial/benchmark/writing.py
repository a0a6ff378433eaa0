"""One token at a time: the step, whole texts, and a token after long contexts."""

import copy
import importlib
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_tutorial.attention import Transformer
from mamba_tutorial.benchmark.measuring import (
    Row,
    attempt,
    copy_bandwidth,
    milliseconds,
    only,
    relative,
)
from mamba_tutorial.benchmark.models import SMALL, SMALL_TRANSFORMER, official_model
from mamba_tutorial.generation import StepGraph
from mamba_tutorial.mamba import MambaLM

NEW_TOKENS = 64  # that every program writes in `generation`


def decode() -> Iterator[Row]:
    """One step of the scan, d_inner 5120, against the time that its bytes take in a copy."""
    bandwidth = copy_bandwidth()
    kernel = importlib.import_module("mamba_tutorial.kernels.decode").selective_step
    for batch in (1, 16, 64, 128, 256, 512):
        h = torch.randn(batch, 5120, 16, device="cuda")
        x, dt, z = torch.randn(3, batch, 5120, device="cuda").bfloat16()
        B, C = torch.randn(2, batch, 16, device="cuda").bfloat16()
        A, (D, bias) = -torch.rand(5120, 16, device="cuda"), torch.randn(2, 5120, device="cuda")
        least = 2 * h.nbytes + 4 * x.nbytes + A.nbytes
        shape = {"batch": batch, "floor_us": 1e6 * least / bandwidth}

        def repeated(step: Callable, h=h) -> Row:
            """Time many steps in one graph, over states that do not fit into the cache together."""
            count = max(4, min(64, (1 << 28) // h.nbytes))
            states = [h.clone() for _ in range(count)]
            took, how = milliseconds(lambda: [step(state) for state in states])
            return {"us": 1e3 * took / count, "how": how}

        def ours(given=(x, dt, A, B, C, D, z, bias), repeated=repeated) -> Row:
            return repeated(lambda state: kernel(state, *given))

        def official(h=h, given=(x, dt, A, B, C, D, z, bias), repeated=repeated) -> Row:
            module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
            y = module.selective_state_update(h.clone(), *given, dt_softplus=True)
            error = relative(kernel(h, *given)[0], y)
            step = module.selective_state_update
            return repeated(lambda state: step(state, *given, dt_softplus=True)) | {
                "difference": error
            }

        yield attempt({**shape, "name": "mamba_tutorial"}, ours)
        yield attempt({**shape, "name": "mamba_ssm, Triton"}, official)


def generation() -> Iterator[Row]:
    """Tokens per second of whole models of 130 million parameters: 64, greedy, after 16.

    bfloat16. "step alone" is the replayed step of ours without the choice of a token. mamba_ssm's
    writes with its CUDA graph, the Transformer with one, too, that of GPT-NeoX as it comes.
    """
    torch.manual_seed(0)
    model = MambaLM(SMALL).cuda().bfloat16().eval()
    for batch in (1, 8, 32, 128, 512):
        ids = torch.randint(50000, (batch, 16), device="cuda")

        def alone(ids=ids, batch=batch) -> Row:
            step, state = StepGraph(model, batch), model.initial_state(batch)
            _, state = step(ids[:, 0], state)
            took, _ = milliseconds(lambda: step(ids[:, 0], state))
            return {"tokens_per_s": 1e3 * batch / took, "ms_per_token": took}

        candidates = {
            "mamba_tutorial": lambda: partial(
                model.generate, max_new_tokens=NEW_TOKENS, temperature=0
            ),
            "mamba_ssm, CUDA graph": _official_generate,
            "transformers, Mamba": partial(_generate_of_transformers, "Mamba"),
            "Transformer, CUDA graph": partial(_transformer_generate, batch),
            "transformers, GPTNeoX": partial(_generate_of_transformers, "GPTNeoX"),
        }
        yield attempt({"batch": batch, "name": "mamba_tutorial, step alone"}, alone)
        for name, make in candidates.items():
            row = {"batch": batch, "name": name}
            yield attempt(row, lambda m=make, i=ids: _throughput(m(), i))


def _throughput(write: Callable[[Tensor], Tensor], ids: Tensor) -> Row:
    with torch.no_grad():
        write(ids)  # all of it: cuDNN makes a new plan for every length of a cache that grows
        torch.cuda.synchronize()
        start = time.perf_counter()
        written = write(ids)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    new = written.shape[1] - ids.shape[1]
    if new != NEW_TOKENS:
        raise ValueError(f"{new} tokens were written, expected {NEW_TOKENS}")
    return {"tokens_per_s": len(ids) * new / seconds, "ms_per_token": 1e3 * seconds / new}


def _official_generate() -> Callable[[Tensor], Tensor]:
    model = copy.deepcopy(official_model()).bfloat16().eval()
    return lambda ids: model.generate(ids, ids.shape[1] + NEW_TOKENS, top_k=1, cg=True)


@lru_cache
def _generate_of_transformers(name: str) -> Callable[[Tensor], Tensor]:
    """Return generate of a model of transformers of the same size."""
    library = importlib.import_module("transformers")
    sizes = (
        {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280, "state_size": 16}
        if name == "Mamba"
        else {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072,
              "num_attention_heads": 12, "vocab_size": 50304, "tie_word_embeddings": False}
    )  # fmt: skip
    config = getattr(library, f"{name}Config")(**sizes)
    model = getattr(library, f"{name}ForCausalLM")(config).cuda().bfloat16().eval()

    def generate(ids: Tensor) -> Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    return generate


def _transformer_generate(batch: int) -> Callable[[Tensor], Tensor]:
    model = Transformer(SMALL_TRANSFORMER).cuda().bfloat16().eval()
    _, attention = _quickest_token(model, batch, 16)
    with only(attention):
        token = TokenGraph(model, batch, 16 + NEW_TOKENS)

    def generate(ids: Tensor) -> Tensor:
        state = token.state._replace(length=torch.zeros_like(token.state.length))
        logits, state = model.prefill(ids, state)
        token.state.length.copy_(state.length)
        token.ids.copy_(logits[:, -1].argmax(-1))
        written = [ids, token.ids[:, None].clone()]
        for _ in range(NEW_TOKENS - 1):
            token()
            written.append(token.ids[:, None].clone())
        return torch.cat(written, dim=1)

    return generate


def contexts() -> Iterator[Row]:
    """One more token of a model of 130 million parameters, after contexts of several lengths.

    bfloat16, a replayed CUDA graph for both. The Transformer has 12 layers, the same width, a
    cache of fixed size, the quickest attention that PyTorch has for it, and no codes of positions.
    """
    torch.manual_seed(0)
    model = MambaLM(SMALL).cuda().bfloat16().eval()
    for batch in (1, 16, 64):

        def ours(batch=batch) -> Row:
            step, state = StepGraph(model, batch), model.initial_state(batch)
            ids = torch.randint(50000, (batch,), device="cuda")
            _, state = step(ids, state)
            took, _ = milliseconds(lambda: step(ids, state))
            kept = sum(part.nbytes for pair in state for part in pair) / 2**20
            return {"ms_per_token": took, "kept_mib": kept}

        yield attempt({"name": "mamba_tutorial", "batch": batch}, ours)
        for context in (1024, 4096, 16384, 65536):
            row = {"name": "Transformer", "batch": batch, "context": context}
            yield attempt(row, partial(_transformer_token, batch, context))


@torch.no_grad()
def _transformer_token(batch: int, context: int) -> Row:
    """Return the time of a token, by the quickest attention, and the size of the cache."""
    model = LeanTransformer(batch, context).cuda().bfloat16()
    ids = torch.randint(50000, (batch,), device="cuda")
    times = {}
    for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with only(kind):
                times[kind] = milliseconds(lambda: model(ids))[0]
        except RuntimeError:  # a backend that cannot do this
            continue
    best = min(times, key=times.get)
    return {"ms_per_token": times[best], "attention": best, "kept_mib": model.cache.nbytes / 2**20}


class LeanTransformer(torch.nn.Module):
    """A Transformer of the size of mamba-130m, for one token after a context of fixed length.

    Without a code of positions and without a mask, which would cost kernels: so it is quicker than
    `attention.Transformer` could be.
    """

    def __init__(self, batch: int, context: int, layers: int = 12, width: int = 768):
        super().__init__()
        self.width, self.heads = width, width // 64
        self.embedding = torch.nn.Embedding(50280, width)
        self.norm = torch.nn.RMSNorm(width)
        sizes = {"qkv": (width, 3), "out": (width, 1), "up": (width, 4)}
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {name: torch.nn.Linear(n, k * n, bias=False) for name, (n, k) in sizes.items()}
                | {"down": torch.nn.Linear(4 * width, width, bias=False)}
                | {"first": torch.nn.RMSNorm(width), "second": torch.nn.RMSNorm(width)}
            )
            for _ in range(layers)
        )
        shape = layers, 2, batch, self.heads, context + 1, 64
        self.register_buffer("cache", torch.randn(shape, dtype=torch.bfloat16, device="cuda"))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next token; ids (batch,)."""
        u = self.embedding(ids)[:, None]
        for layer, (keys, values) in zip(self.layers, self.cache.unbind(0), strict=True):
            q, k, v = (
                part.unflatten(-1, (self.heads, 64)).transpose(1, 2)
                for part in layer["qkv"](layer["first"](u)).chunk(3, dim=-1)
            )
            keys[:, :, -1:], values[:, :, -1:] = k, v
            y = F.scaled_dot_product_attention(q, keys, values)
            u = u + layer["out"](y.transpose(1, 2).flatten(2))
            u = u + layer["down"](F.gelu(layer["up"](layer["second"](u))))
        return self.norm(u[:, 0]) @ self.embedding.weight.T


def _quickest_token(model: Transformer, batch: int, context: int) -> tuple[float, str]:
    """Return the time of a token after `context` others, and the attention that needs the least."""
    times = {}
    for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with only(kind):
                times[kind] = TokenGraph(model, batch, context + 1).milliseconds(context)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # a backend that cannot do this
            continue
    best = min(times, key=times.get)
    return times[best], best


class TokenGraph:
    """The most probable next token of a Transformer, chosen again and again by one CUDA graph."""

    @torch.no_grad()
    def __init__(self, model: Transformer, batch: int, room: int):
        self.state = model.initial_state(batch, room)
        self.ids = torch.zeros(batch, dtype=torch.long, device="cuda")
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            model.step(self.ids, self.state)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            logits, after = model.step(self.ids, self.state)
            self.ids.copy_(logits.argmax(-1))
            self.state.length.copy_(after.length)

    def __call__(self) -> None:
        """Replace the ids by those that follow them."""
        self.graph.replay()

    def milliseconds(self, context: int) -> float:
        """Return the time of a token after so many others."""

        def token() -> None:
            self.state.length.fill_(context)
            self.graph.replay()

        triton = importlib.import_module("triton")
        return triton.testing.do_bench(token, warmup=25, rep=60, return_mode="median")
