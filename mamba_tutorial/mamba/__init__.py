"""Mamba: the block around the selective state space model, and a language model of such blocks.

    block      x, z = W_in u;   x = silu(conv(x));   y = SSM(x) · silu(z);   u ← W_out y
    model      embedding, then n_layer times u ← u + block(rmsnorm(u)), then rmsnorm and the head

From the Mamba paper (Gu and Dao 2023), Section 3.4, and `Mamba`, `Block` and `MambaLMHeadModel` of
mamba_ssm. The names of the parameters follow the released code, but for those in
`checkpoints.RENAMES`.

A sequence can be read in three ways, with the same result: whole (`forward`), in pieces (`prefill`,
which takes a state and returns one), and token by token (`step`).
"""

import math
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mamba_tutorial import checkpoints
from mamba_tutorial._check import (
    check_flag,
    check_ids,
    check_ids_axes,
    check_length,
    check_memory,
    check_number,
    check_row,
    wide,
)
from mamba_tutorial.generation import (
    check_sampling,
    end_tokens,
    filled_up,
    lent_graph,
    repeated_less,
    sample,
    starts_of,
)
from mamba_tutorial.mamba._block import BlockState, MambaBlock, MambaConfig, check_config
from mamba_tutorial.mamba._convolution import CausalConv1d

__all__ = ["BlockState", "CausalConv1d", "MambaBlock", "MambaConfig", "MambaLM"]

Ids = Int[Tensor, "batch length"]
State = tuple[BlockState, ...]  # one for each block of a model


class _Layer(nn.Module):
    """u ← u + block(norm(u)), with u in float32 at least, whatever the block computes in."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = MambaBlock(config)

    def forward(
        self, u: Tensor, state: BlockState | None = None, starts: Tensor | None = None
    ) -> Tensor | tuple[Tensor, BlockState]:
        """Read sequences or a token of each; see `MambaBlock.forward`."""
        given = self.norm(u.to(self.norm.weight.dtype))
        row = {} if starts is None else {"starts": starts}
        if state is None:
            return u + self.mixer(given, **row).to(u.dtype)
        y, state = self.mixer(given, state, **row)
        return u + y.to(u.dtype), state


class MambaLM(nn.Module):
    """A language model of Mamba blocks: token ids in, logits of the next token out.

    The start is that of `MambaLMHeadModel`: embeddings normal with deviation 0.02, the weights of
    every out_proj divided by √n_layer, biases zero but for the convolution's and Δ's.

    A_log and D keep float32 under autocast. They should not decay, nor should biases and norms:
    `mamba_tutorial.training.parameter_groups` sorts the parameters for an optimizer.

    Args:
        config: the sizes.
    """

    def __init__(self, config: MambaConfig):
        check_config(config)
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.rows, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.rows, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        with torch.no_grad():
            for layer in self.layers:
                layer.mixer.out_proj.weight /= math.sqrt(config.n_layer)

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initial_state(self, batch: int) -> State:
        """Return the state before the first token of `batch` sequences."""
        return tuple(layer.mixer.initial_state(batch) for layer in self.layers)

    def forward(
        self,
        ids: Ids | Int[Tensor, " batch"],
        state: State | None = None,
        *,
        last: bool = False,
        starts: Bool[Tensor, "batch length"] | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """Return the logits of the next token after every token.

        `prefill` and `step` are this call with a state, and so is generation; whatever is hooked to
        the model or its layers sees them all.

        Args:
            ids: (batch, length), whole numbers; with a state also (batch,), one token of each.
            state: what was read before; None for the start of the sequences.
            last: return the logits after the last token only, (batch, vocab_size).
            starts: (batch, length), true where a new sequence begins: nothing before it is seen. So
                sequences can be packed into rows; and what fills a row up before a sequence, on its
                left, is without effect.

        Returns:
            Logits (batch, length, vocab_size), or (batch, vocab_size) of one token; if a state was
            given, also the state after the tokens.

        Raises:
            TypeError: ids is no tensor of whole numbers; the state is none.
            ValueError: ids is not (batch, length), is empty, or has an id outside the vocabulary
                (on a GPU, where that is not waited for, such an id ends the program); the state is
                of another batch or model.
        """
        check_flag("last", last)
        ids = self._check_ids(ids, (2,) if state is None else (1, 2))
        if state is not None:
            _check_state(state, self.config.n_layer)
        if starts is not None:
            check_row(starts, ids, 2)
        u, state = self._run(ids, state, starts)
        logits = self._logits(u[:, -1] if last and ids.ndim == 2 else u)
        return logits if state is None else (logits, state)

    def hidden_states(self, ids: Ids) -> list[Float[Tensor, "batch length d_model"]]:
        """Return the residual stream: the embedding, what each layer makes of it, and the norm's.

        These are n_layer + 2 tensors; transformers returns the same without the first.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        u = self.embedding(self._check_ids(ids, (2,)))
        stream = [u.to(wide(u.dtype))]
        for layer in self.layers:
            stream.append(layer(stream[-1]))
        return [*stream, self.norm_f(stream[-1].to(self.norm_f.weight.dtype))]

    def prefill(
        self,
        ids: Ids,
        state: State | None = None,
        starts: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length vocab_size"], State]:
        """Read a piece of the sequences after others; return its logits and the state after it.

        Args:
            ids: (batch, length).
            state: what `prefill` or `step` returned last; None at the start of the sequences.
            starts: (batch, length), true where a new sequence begins, as in `forward`.

        Raises:
            TypeError, ValueError: as `forward`; or the state is of another batch or model.
        """
        check_ids_axes(ids, (2,))
        state = self.initial_state(len(ids)) if state is None else state
        return self(ids, state, starts=starts)

    def step(
        self, ids: Int[Tensor, " batch"], state: State
    ) -> tuple[Float[Tensor, "batch vocab_size"], State]:
        """Read one token of each sequence; return the logits of the next, and the state.

        Raises:
            TypeError, ValueError: as `prefill`, with ids (batch,).
        """
        check_ids_axes(ids, (1,))
        _check_state(state, self.config.n_layer)
        return self(ids, state)

    @torch.no_grad()
    def stream(
        self,
        ids: Ids,
        max_new_tokens: int,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | Collection[int] | None = None,
        generator: torch.Generator | None = None,
        state: State | None = None,
        min_p: float | None = None,
        repetition_penalty: float | int = 1.0,
        mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Yield the next tokens of each sequence, one after the other, as they are drawn.

        The arguments are those of `generate`. A sequence that has ended goes on with eos; when all
        have ended, so does the stream. Nothing is computed, nor checked, before the first token is
        asked for.

        Raises:
            TypeError, ValueError: as `generate`, at the first token.
        """
        max_new_tokens = check_length(max_new_tokens, name="max_new_tokens")
        check_sampling(temperature, top_k, top_p, generator, min_p)
        check_number("repetition_penalty", repetition_penalty, above=0)
        check_ids_axes(ids, (2,))
        ends = end_tokens(eos, self.config.vocab_size, ids.device)
        starts = None if mask is None else starts_of(mask, ids, state)
        seen = None
        if repetition_penalty != 1:
            ids = self._check_ids(ids, (2,))
            seen = ids.new_zeros(len(ids), self.config.vocab_size, dtype=torch.bool)
            tokens = ids if mask is None else torch.where(mask, ids, ids[:, -1:])
            seen.scatter_(1, tokens, value=True)
        state = self.initial_state(len(ids)) if state is None else state
        logits, state = self(ids, state, last=True, starts=starts)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        graphed = ids.is_cuda and max_new_tokens > 1 and not torch.is_autocast_enabled("cuda")
        with lent_graph(self, len(ids)) if graphed else nullcontext(self) as advance:
            for count in range(max_new_tokens):
                if seen is not None:
                    logits = repeated_less(logits, seen, repetition_penalty)
                token = sample(logits, temperature, top_k, top_p, generator, min_p)
                if ends is not None:
                    token = torch.where(ended, ends[0], token)
                    ended |= torch.isin(token, ends)
                yield token
                if count == max_new_tokens - 1 or (ends is not None and ended.all()):
                    return
                if seen is not None:
                    seen.scatter_(1, token[:, None], value=True)
                logits, state = advance(token, state)

    def generate(
        self,
        ids: Ids | list[Int[Tensor, " _"]],
        max_new_tokens: int,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | Collection[int] | None = None,
        generator: torch.Generator | None = None,
        state: State | None = None,
        min_p: float | None = None,
        repetition_penalty: float | int = 1.0,
        mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Int[Tensor, "batch longer"] | list[Int[Tensor, " _"]]:
        """Continue the sequences by tokens drawn from the model.

        Args:
            ids: (batch, length), the prompts; or a list of them, of any lengths.
            max_new_tokens: how many tokens to add at most.
            temperature: the logits are divided by it; 0 takes the most probable token.
            top_k: draw from the k most probable tokens only.
            top_p: draw from the fewest most probable tokens that hold this probability together.
            eos: the token that ends a sequence, or several such; what follows is the first of them.
            generator: the source of randomness, on the device of ids; PyTorch's own by default.
            state: what was read before the prompts, as `prefill` returns it; they have one length.
            min_p: draw from the tokens only that are at least min_p times as probable as the most
                probable one (Nguyen et al. 2024).
            repetition_penalty: logits of tokens that the prompt or the new tokens hold already are
                divided by it if positive, else multiplied (Keskar et al. 2019); 1 for none.
            mask: (batch, length), false for what fills up a prompt, on its left, to the length of
                the longest; transformers calls it attention_mask. Not with a state.

        Returns:
            (batch, length + new): the prompts and what follows, or a list of such rows if a list
            was given. Fewer than max_new_tokens are new if every sequence ended before.

        On a GPU the steps are a CUDA graph (`StepGraph`). It stays for the next call, with the room
        of one state, until the model goes or changes.

        Raises:
            TypeError, ValueError: as `forward`; or an argument is out of its range.
        """
        max_new_tokens = check_length(max_new_tokens, name="max_new_tokens")
        prompts = None
        if isinstance(ids, list):
            if mask is not None:
                raise ValueError("mask is given with a list of ids, expected None")
            prompts, (ids, mask) = ids, filled_up(ids)
            if mask is not None and state is not None:
                lengths = [len(prompt) for prompt in prompts]
                raise ValueError(f"ids have lengths {lengths} after a state, expected one length")
        check_ids_axes(ids, (2,))
        check_memory("max_new_tokens", max_new_tokens, max_new_tokens * len(ids))
        sampling = temperature, top_k, top_p, eos, generator, state, min_p, repetition_penalty
        new = torch.stack(list(self.stream(ids, max_new_tokens, *sampling, mask)), dim=1)
        if prompts is not None:
            return [torch.cat([one.long(), row]) for one, row in zip(prompts, new, strict=True)]
        return torch.cat([ids.long(), new], dim=1)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "MambaLM":
        """Load a trained model, in float32, on the CPU, in evaluation mode.

        Args:
            name: a folder; or, as a str, a name on the hub such as "state-spaces/mamba-130m" or
                "state-spaces/mamba-130m-hf". Both layouts, safetensors and pickles are read; see
                `mamba_tutorial.checkpoints`.

        Raises:
            TypeError: name is no str and no path.
            FileNotFoundError: there is no such folder, or a file is missing in it.
            ImportError: safetensors or huggingface_hub is needed and not installed.
            ValueError: the config is of another model; a tensor is missing, unknown or given twice,
                has another shape, or holds no finite floats; a file is damaged, or holds more than
                tensors. The message names the file.
        """
        config, tensors = checkpoints.load(checkpoints.locate(name), MambaConfig)
        with torch.device("meta"):  # the modules, without numbers that would be thrown away
            model = cls(config)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` and transformers' MambaForCausalLM load.

        The rows of the embedding that are no tokens are left out. If anything fails, the folder is
        as it was; if the machine stops half-way, `from_pretrained` notices.

        Raises:
            TypeError: folder is no str and no path.
            ImportError: safetensors is not installed.
            OSError: the folder cannot be written, or the disk is full.
            ValueError: a tensor is not one of the config's, or holds no finite floats.
        """
        tensors = dict(self.state_dict())
        for name in {"embedding.weight", "lm_head.weight"} & set(tensors):
            tensors[name] = tensors[name][: self.config.vocab_size]
        config = replace(self.config, dt_rank=self.config.rank, pad_vocab_size_multiple=1)
        checkpoints.save(checkpoints.as_path("folder", folder), config, tensors)

    def _check_ids(self, ids: Tensor, axes: tuple[int, ...]) -> Tensor:
        return check_ids(ids, self.config.vocab_size, axes, self.embedding.weight.device)

    def _run(
        self, ids: Tensor, state: State | None, starts: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        u = self.embedding(ids)
        u = u.to(wide(u.dtype))
        row = {} if starts is None else {"starts": starts}
        if state is None:
            for layer in self.layers:
                u = layer(u, **row)
            return u, None
        states = []
        for layer, before in zip(self.layers, state, strict=True):
            u, after = layer(u, before, **row)
            states.append(after)
        return u, tuple(states)

    def _logits(self, u: Tensor) -> Tensor:
        u, count = self.norm_f(u.to(self.norm_f.weight.dtype)), self.config.vocab_size
        if self.config.tie_embeddings:
            return F.linear(u, self.embedding.weight[:count])
        return self.lm_head(u)[..., :count]


def _check_state(state: State, blocks: int) -> None:
    if not isinstance(state, tuple | list):
        raise TypeError(f"state is a {type(state).__name__}, expected a tuple of BlockStates")
    if len(state) != blocks:
        raise ValueError(f"state has {len(state)} blocks, expected {blocks}")
    if any(block is None for block in state):
        raise TypeError("state has None for a block, expected a BlockState")
