"""Any differentiable call, by autograd: a cached graph of it and of its backward.

The push is the double-vjp: the backward is linear in its cotangent c, so differentiating it in c
along v gives J v. It needs no forward-mode formula (LSTM has none) and no second forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..operators.tangent import is_plain
from .base import Call, Curvature, Node, Tangents, Work
from .gram import Deltas
from .opaque import handle_of, pull_opaquely, push_opaquely
from .per_sample import AT_ONCE, TOLD_APART, WRITTEN, SampleGradients
from .work import work_of


class GenericNode(Node):
    """y = f(x_1, ..., x_n) with any number of outputs.

    Batches of columns are `is_grads_batched` passes over graphs that were themselves built
    without vmap, which is the composition that is right through norms (design.md section 6).
    """

    def __init__(self, call: Call) -> None:
        slots = call.slots
        self._owner = call.owner
        self._within = call.within or nullcontext
        # With a count of writes of its own: autograd refuses a graph whose weights were written to
        # even if they were put back, and the problem's snapshot knows better.
        self._inputs = [slot.value.data.requires_grad_() for slot in slots]
        args, kwargs = tree_map_only(Tensor, lambda t: t.data, (call.args, dict(call.kwargs)))
        with torch.enable_grad():
            result = replace(call, args=args, kwargs=kwargs).with_values(self._inputs)
            leaves = [leaf for leaf in tree_leaves(result) if is_active_leaf(leaf)]
            self.moves = [leaf.requires_grad for leaf in leaves]
            self._outputs = [leaf for leaf in leaves if leaf.requires_grad]
            self._seeds = [torch.zeros_like(y, requires_grad=True) for y in self._outputs]
            self._pulled = self._grad_with_graph(self._seeds)
        super().__init__(tree_map_only(Tensor, lambda t: t.detach(), result), slots)
        self._call = call
        self._by_sample: SampleGradients | None = None
        self._handle = handle_of(self)
        if _has_custom_function(self._outputs):
            self._probe()

    @property
    def sides(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The inputs and the outputs that move."""
        return self._inputs, self._outputs

    def push(self, tangents: Tangents) -> Tensor:
        """J dx."""
        (result,) = self.push_all(tangents)
        assert result is not None
        return result

    def push_all(self, tangents: Tangents) -> tuple[Tensor | None, ...]:
        """J dx, for every output."""
        if torch.compiler.is_compiling():
            return push_opaquely(self._handle, tangents, len(self._outputs))
        pairs = [
            (g, t)
            for g, t in zip(self._pulled, tangents, strict=True)
            if g is not None and t is not None and g.requires_grad
        ]
        with self._explained(), self._within():
            return tuple(_grad([g for g, _ in pairs], self._seeds, [t for _, t in pairs]))

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """J' c."""
        return self.pull_all([cotangent], needed, out)

    def pull_all(
        self,
        cotangents: Sequence[Tensor | None],
        needed: Sequence[bool],
        out: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """J' c, from every output."""
        if torch.compiler.is_compiling():
            return pull_opaquely(self._handle, cotangents, needed)
        pairs = [(y, c) for y, c in zip(self._outputs, cotangents, strict=True) if c is not None]
        wanted = [x for x, need in zip(self._inputs, needed, strict=True) if need]
        with self._within():
            pulled = iter(_grad([y for y, _ in pairs], wanted, [c for _, c in pairs]))
        return [next(pulled) if need else None for need in needed]

    def work(self) -> Work:
        """What the graph's nodes take."""
        return work_of(self._outputs)

    def gram_flops(self, size: int) -> float:
        """Those of gradients that are written out, and of all their products."""
        width = sum(
            x.numel() for x, held in zip(self._inputs, self._are_parameters, strict=True) if held
        )
        return float(size) * width * (size + WRITTEN)

    def gram_passes(self, rank: int, samples: int) -> float:
        """By the way that one sample goes; the best where to find out costs as much."""
        if samples < TOLD_APART:
            return AT_ONCE
        (output,) = self._outputs
        one = Deltas(
            output.detach().unsqueeze(0)[:, :1],
            samples,
            torch.zeros(1, dtype=torch.int64, device=output.device),
        )
        self.gradients_of_samples(one, self._are_parameters)
        assert self._by_sample is not None
        return self._by_sample.passes(rank, samples)

    @property
    def _are_parameters(self) -> list[bool]:
        return [slot.is_parameter for slot in self._call.slots]

    def gradient_size(self, deltas: Deltas, needed: Sequence[bool]) -> int:
        """That of the inputs."""
        return sum(x.numel() for x, need in zip(self._inputs, needed, strict=True) if need)

    def gradients_of_samples(self, deltas: Deltas, needed: Sequence[bool]) -> list[Tensor | None]:
        """By the call on single samples, if that gives what the whole batch does."""
        if self._by_sample is None:
            moves = list(self.moves or ())
            self._by_sample = SampleGradients(
                self._call,
                self._inputs,
                lambda result: _moving_output(result, moves),
                _grad,
                deltas.batch,
            )
        nothing: list[Tensor | None] = [None] * len(needed)
        found = self._by_sample(
            deltas, needed, lambda column: self.pull_all([column], needed, nothing)
        )
        return super().gradients_of_samples(deltas, needed) if found is None else found

    def curvature(self, costate: Tensor) -> Curvature | None:
        """Second derivative of <p, f>."""
        return self.curvature_all([costate])

    def curvature_all(self, costates: Sequence[Tensor | None]) -> Curvature | None:
        """Second derivative of the sum of <p_i, f_i>, by reverse over reverse."""
        seeds = [
            torch.zeros_like(y) if p is None else p
            for y, p in zip(self._outputs, costates, strict=True)
        ]
        with torch.enable_grad():
            gradients = self._grad_with_graph(seeds)
        live = [g is not None and g.requires_grad for g in gradients]
        if not any(live):
            return None

        def product(tangents: Tangents) -> list[Tensor | None]:
            pairs = [
                (g, t)
                for g, t, is_live in zip(gradients, tangents, live, strict=True)
                if is_live and g is not None and t is not None
            ]
            with self._explained(), self._within():
                return _grad([g for g, _ in pairs], self._inputs, [t for _, t in pairs])

        return product

    def _grad_with_graph(self, seeds: Sequence[Tensor]) -> list[Tensor | None]:
        if not self._outputs:
            return [None] * len(self._inputs)
        with self._explained(), self._within():
            return list(
                torch.autograd.grad(
                    self._outputs, self._inputs, seeds, create_graph=True, allow_unused=True
                )
            )

    def _probe(self) -> None:
        """Compares <c, J v> with <J'c, v>.

        Where a custom backward cannot be differentiated, autograd gives zeros without a word.
        """
        v = [_pattern(x) for x in self._inputs]
        c = [_pattern(y) for y in self._outputs]
        pushed = self.push_all(v)
        pulled = self.pull_all(c, [True] * len(v), [None] * len(v))
        left, right, scale = 0.0, 0.0, 0.0
        for a, b in zip(c, pushed, strict=True):
            left += 0.0 if b is None else float((a.conj() * b).real.sum())
        for a, b in zip(v, pulled, strict=True):
            right += 0.0 if b is None else float((a.conj() * b).real.sum())
            scale += 0.0 if b is None else float((a * b).abs().sum())
        if not abs(left - right) <= 100 * torch.finfo(v[0].dtype).eps ** 0.5 * scale:
            with self._explained():
                raise RuntimeError("a custom autograd.Function's backward is not differentiable")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says which module has no second backward, and what can be done."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            where = f"'{self._owner}'" if self._owner else "the model's own code"
            raise NotImplementedError(
                f"{where} has no second backward pass ({error}). Curvature needs one: replace the "
                "fused or custom function there by plain torch operations, or freeze the module's "
                "parameters and everything before it."
            ) from error


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor]
) -> list[Tensor | None]:
    """The vjp through a kept graph for k seeds at once; results have the leading axis too."""
    if not outputs or not inputs:
        return [None] * len(inputs)
    options: dict[str, Any] = {
        "retain_graph": True,
        "allow_unused": True,
        # A graph of the result is wanted only by a caller who differentiates in the seeds.
        "create_graph": not all(is_plain(seed) for seed in seeds),
    }
    if len(seeds[0]) > 1:
        try:
            batched = torch.autograd.grad(
                outputs, inputs, list(seeds), is_grads_batched=True, **options
            )
            return list(batched)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # vmap cannot go through every custom backward
            pass
    columns = [
        torch.autograd.grad(outputs, inputs, [seed[i] for seed in seeds], **options)
        for i in range(len(seeds[0]))
    ]
    if len(columns) == 1:
        return [None if g is None else g.unsqueeze(0) for g in columns[0]]
    return [None if g[0] is None else torch.stack(g) for g in zip(*columns, strict=True)]


def _has_custom_function(outputs: Sequence[Tensor]) -> bool:
    """Whether Python code is behind a step of the backward pass."""
    seen: set[object] = set()
    waiting = [y.grad_fn for y in outputs]
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(function)
        waiting.extend(following for following, _ in function.next_functions)
    return False


def _pattern(like: Tensor) -> Tensor:
    """One column of numbers that look random; drawing some would change the dropout masks."""
    places = torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float32)
    return (places * places).sin().to(like.dtype).reshape(1, *like.shape)


def _moving_output(result: Any, moves: Sequence[bool]) -> Tensor:
    """The only output that depends on the active inputs."""
    leaves = [leaf for leaf in tree_leaves(result) if is_active_leaf(leaf)]
    return leaves[list(moves).index(True)]


def is_active_leaf(leaf: object) -> bool:
    """Whether an output can carry a tangent."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
