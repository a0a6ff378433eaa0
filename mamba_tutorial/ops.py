"""Compiled routines as operators of PyTorch: the one mechanism that all of them go through.

PyTorch cannot look into a loop of Numba or a kernel of Triton. `register` tells it what it has to
know about a routine, once, with `torch.library`:

- what its results look like, without computing them: for `torch.compile` and `torch.export`;
- its gradient: another operator, or, where there is no kernel for it, that of its definition;
- what it does to a batch of calls: for `torch.vmap`.

The definition is the same computation in PyTorch's own operations. It is slow and can be
differentiated as often as one likes. So where a kernel knows no further derivative, a second one or
one in forward mode, the definition has it.

The modules register their routines beside their definitions, all in `OPERATORS`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

Outputs = Tensor | tuple[Tensor, ...]
# (which inputs want one, gradients of the outputs, inputs, kept outputs) → gradients of the inputs
Gradient = Callable[[Sequence[bool], Sequence, Sequence, Sequence[Tensor]], Sequence]

OPERATORS: dict[str, "Operator"] = {}


class Operator:
    """A registered routine; a call is a call of the routine, whatever transforms it is under.

    Args:
        name: in the namespace `torch.ops.mamba_tutorial`.
        schema: arguments and results, as `torch.library.define` takes them.
        run: the routine. It sees tensors with numbers, and returns as many tensors as the schema.
            It must not conjugate lazily: a compiled program calls it where PyTorch does not look.
        like: returns tensors like the results, of any content.
        definition: the differentiable results, by PyTorch's own operations.
        gradient: returns the gradients of the inputs, one for each; None is for the definition's.
        kept: which results the gradient needs.
        hidden: how many results, from the last, are there for the gradient only.
        fusible: the results by operations of which a compiler makes few kernels on a GPU, where
            that is better than a call of the routine.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        run: Callable[..., Outputs],
        like: Callable[..., Outputs],
        definition: Callable[..., Outputs],
        gradient: Gradient | None,
        kept: tuple[int, ...],
        hidden: int,
        fusible: Callable[..., Outputs] | None,
    ):
        self.run, self.like, self.definition, self.fusible = run, like, definition, fusible
        self.gradient = gradient or self._gradient_of_definition
        self.kept, self.hidden = kept, hidden
        qualified = f"mamba_tutorial::{name}"
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", self._run)
        torch.library.register_fake(qualified, like)
        torch.library.register_autograd(qualified, self._backward, setup_context=self._setup)
        torch.library.register_vmap(qualified, self._vmap)
        self.op = getattr(torch.ops.mamba_tutorial, name).default
        # the same for torch.func, whose transforms do not see what is registered above
        members = {
            "forward": self.op,
            "setup_context": self._setup,
            "backward": self._backward,
            "vmap": self._vmap,
        }
        members = {key: staticmethod(value) for key, value in members.items()}
        self.function = type(name, (torch.autograd.Function,), members)

    def __call__(self, *inputs) -> Outputs:
        """Return the results."""
        if torch.compiler.is_compiling():
            fuse = self.fusible is not None and inputs[0].is_cuda
            return self.fusible(*inputs) if fuse else self.op(*inputs)
        if forward_ad._current_level >= 0:
            return self.definition(*inputs)
        if torch._C._are_functorch_transforms_active():
            return self.function.apply(*inputs)
        return self.op(*inputs)

    def _run(self, *inputs) -> Outputs:
        model = next(value for value in inputs if isinstance(value, Tensor))
        if model.numel() == 0:  # an empty batch: nothing to compute, and all sums are zero
            empty = self.like(*inputs)
            return empty.zero_() if isinstance(empty, Tensor) else tuple(e.zero_() for e in empty)
        with without_autocast(model):
            return self.run(*inputs)

    def _setup(self, ctx, inputs: tuple, output: Outputs) -> None:
        ctx.set_materialize_grads(False)
        output = _tuple(output)
        if self.hidden:
            ctx.mark_non_differentiable(*output[-self.hidden :])
        given = [value for value in inputs if isinstance(value, Tensor)]
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in inputs]
        ctx.save_for_backward(*given, *(output[k] for k in self.kept))

    def _backward(self, ctx, *upstream: Tensor | None) -> tuple:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if value is None else value[0] for value in ctx.constants]
        if all(gradient is None for gradient in upstream):
            return (None,) * len(inputs)
        wanted = [
            w and isinstance(v, Tensor) for w, v in zip(ctx.needs_input_grad, inputs, strict=True)
        ]
        gradients = self.gradient(wanted, upstream, inputs, list(saved))
        return tuple(
            gradient.to(value.dtype) if want and gradient is not None else None
            for want, value, gradient in zip(wanted, inputs, gradients, strict=True)
        )

    def _gradient_of_definition(self, wanted, upstream, inputs, kept) -> Sequence:
        return vjp(self.definition, wanted, upstream, inputs)

    def _vmap(self, info, axes: tuple, *inputs) -> tuple[Outputs, int | tuple[int, ...]]:
        """One call after the other."""
        calls = [
            self(
                *(
                    v if axis is None else v.select(axis, i)
                    for v, axis in zip(inputs, axes, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if not calls:
            return self._like_none(axes, inputs)
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return results, (0,) * len(results)

    def _like_none(self, axes: tuple, inputs: tuple) -> tuple[Outputs, int | tuple[int, ...]]:
        """What no call at all returns: as one call's, with an axis of size 0 before."""
        one = [
            v if axis is None else v.new_empty(v.movedim(axis, 0).shape[1:])
            for v, axis in zip(inputs, axes, strict=True)
        ]
        like = self.like(*one)
        if isinstance(like, Tensor):
            return like.new_empty(0, *like.shape), 0
        return tuple(part.new_empty(0, *part.shape) for part in like), (0,) * len(like)


def register(
    name: str,
    schema: str,
    run: Callable[..., Outputs],
    like: Callable[..., Outputs],
    definition: Callable[..., Outputs],
    gradient: Gradient | None = None,
    kept: tuple[int, ...] = (),
    hidden: int = 0,
    fusible: Callable[..., Outputs] | None = None,
) -> Operator:
    """Make an `Operator` and enter it in `OPERATORS`; the arguments are its."""
    given = name, schema, run, like, definition, gradient, kept, hidden, fusible
    OPERATORS[name] = Operator(*given)
    return OPERATORS[name]


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Compute in the precision of the numbers given, whatever PyTorch would choose by itself."""
    kind = tensor.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def vjp(
    definition: Callable[..., Outputs],
    wanted: Sequence[bool],
    upstream: Sequence[Tensor | None],
    inputs: Sequence,
) -> list[Tensor | None]:
    """Return the gradients of the wanted inputs, given those of the results; None for the others.

    They can be differentiated again.
    """
    places = [k for k, want in enumerate(wanted) if want]

    def results(*values: Tensor) -> Outputs:
        filled = list(inputs)
        for k, value in zip(places, values, strict=True):
            filled[k] = value
        outputs = _tuple(definition(*filled))
        return tuple(o for o, g in zip(outputs, upstream, strict=False) if g is not None)

    _, pull = torch.func.vjp(results, *(inputs[k] for k in places))
    found = iter(pull(tuple(g for g in upstream if g is not None)))
    return [next(found) if want else None for want in wanted]


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
