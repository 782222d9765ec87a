"""One call, its node, and the same products by plain autograd; shared by the rules' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from llqr_mf.rules import Call, GenericNode, Node, Slot, linearize_call

FIRST = {"rtol": 1e-10, "atol": 1e-11}
SECOND = {"rtol": 1e-9, "atol": 1e-10}


class Active:
    """Marks an argument that moves."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape) + 7 * len(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def active(*shape: int, seed: int = 0) -> Active:
    return Active(normal(*shape, seed=seed))


def node_of(function: Callable[..., Any], *args: Any, second: bool = True, **kwargs: Any) -> Node:
    slots = iter(range(100))
    args, kwargs = tree_map_only(Active, lambda a: Slot(next(slots), a.value), (args, kwargs))
    with torch.no_grad():
        return linearize_call(Call(function, args, kwargs, "here", second))


class Reference:
    """The call as a function of its active arguments, differentiated one column at a time."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        leaves = tree_leaves((args, kwargs))
        self.values = [leaf.value for leaf in leaves if isinstance(leaf, Active)]

    def __call__(self, *values: Tensor) -> list[Tensor]:
        given = iter(values)
        args, kwargs = tree_map_only(Active, lambda _: next(given), (self.args, self.kwargs))
        leaves = tree_leaves(self.function(*args, **kwargs))
        return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]

    def pull(self, cotangents: Sequence[Tensor], *, graph: bool = False) -> tuple[Any, Any]:
        x = [v.clone().requires_grad_() for v in self.values]
        y = self(*x)
        return x, _grad(y, x, cotangents, graph)

    def push(self, tangents: Sequence[Tensor | None]) -> list[Tensor]:
        """By differentiating the pull in its cotangent."""
        x = [v.clone().requires_grad_() for v in self.values]
        y = self(*x)
        seeds = [torch.zeros_like(part, requires_grad=True) for part in y]
        pulled = _grad(y, x, seeds, True)
        pairs = [(g, t) for g, t in zip(pulled, tangents, strict=True) if t is not None]
        pairs = [(g, t) for g, t in pairs if g.requires_grad]
        return _grad([g for g, _ in pairs], seeds, [t for _, t in pairs], False)

    def curvature(
        self, costates: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> list[Tensor]:
        x, g = self.pull(costates, graph=True)
        pairs = [(a, t) for a, t in zip(g, tangents, strict=True) if t is not None]
        pairs = [(a, t) for a, t in pairs if a.requires_grad]
        return _grad([a for a, _ in pairs], x, [t for _, t in pairs], False)


def check(
    function: Callable[..., Any],
    *args: Any,
    generic: bool = False,
    differences: bool = True,
    against: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Node:
    """All products of a call's node, one and three columns, against autograd.

    Args:
        function: Called with `args` and `kwargs`, in which active tensors stand as `Active`.
        args: Its arguments.
        generic: Whether the call is expected to have no rule of its own.
        differences: Whether push and curvature are also compared with finite differences.
        against: The same function, where torch cannot differentiate it twice.
        kwargs: Its keyword arguments.
    """
    node = node_of(function, *args, **kwargs)
    reference = Reference(against or function, args, kwargs)
    assert isinstance(node, GenericNode) == generic, type(node)
    values = reference(*reference.values)
    for found, y in zip(_floating(node.result), values, strict=True):
        torch.testing.assert_close(found, y.detach(), **FIRST)
    node.result = None  # as `linearize` does, to free the activation
    for k in (1, 3):
        tangents = [normal(k, *v.shape, seed=i) for i, v in enumerate(reference.values)]
        cotangents = [normal(k, *y.shape, seed=10 + i) for i, y in enumerate(values)]
        for mask in _masks(len(tangents)):
            _check_push(node, reference, tangents, mask, k)
            _check_pull(node, reference, cotangents, mask, k)
            _check_curvature(node, reference, [c[0] for c in cotangents], tangents, mask, k)
    if differences:
        _check_differences(reference, [y.detach() for y in values])
    return node


def _check_push(node: Node, reference: Any, tangents: Any, mask: Any, k: int) -> None:
    given = [t if keep else None for t, keep in zip(tangents, mask, strict=True)]
    pushed = node.push_all(given)
    for i in range(k):
        columns = [None if t is None else t[i] for t in given]
        for found, expected in zip(pushed, reference.push(columns), strict=True):
            torch.testing.assert_close(_or_zero(found, expected, i), expected, **FIRST)
    for found in pushed:
        assert found is None or len(found) == k


def _check_pull(node: Node, reference: Any, cotangents: Any, mask: Any, k: int) -> None:
    free = [normal(k, *v.shape, seed=99) for v in reference.values]
    for buffers in ([None] * len(mask), free):
        pulled = node.pull_all(cotangents, mask, buffers)
        for place, keep in enumerate(mask):
            found = pulled[place]
            if not keep:
                assert found is None
                continue
            for i in range(k):
                expected = reference.pull([c[i] for c in cotangents])[1][place]
                torch.testing.assert_close(_or_zero(found, expected, i), expected, **FIRST)


def _check_curvature(
    node: Node, reference: Any, costates: Any, tangents: Any, mask: Any, k: int
) -> None:
    curvature = node.curvature_all(costates)
    given = [t if keep else None for t, keep in zip(tangents, mask, strict=True)]
    found = [None] * len(mask) if curvature is None else curvature(given)
    for i in range(k):
        columns = [None if t is None else t[i] for t in given]
        expected = reference.curvature(costates, columns)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(_or_zero(a, b, i), b, **SECOND)


def _check_differences(reference: Reference, values: Sequence[Tensor]) -> None:
    """Guards the reference: central differences of values and of pulls."""
    step = 1e-5
    tangents = [normal(*v.shape, seed=5) for v in reference.values]
    costates = [normal(*y.shape, seed=6) for y in values]
    ahead, behind = (
        Reference(reference.function, *_moved(reference, tangents, sign * step)) for sign in (1, -1)
    )
    for a, b, expected in zip(
        ahead(*ahead.values), behind(*behind.values), reference.push(tangents), strict=True
    ):
        torch.testing.assert_close((a - b) / (2 * step), expected, rtol=1e-5, atol=1e-6)
    for a, b, expected in zip(
        ahead.pull(costates)[1],
        behind.pull(costates)[1],
        reference.curvature(costates, tangents),
        strict=True,
    ):
        torch.testing.assert_close((a - b) / (2 * step), expected, rtol=1e-4, atol=1e-5)


def _moved(reference: Reference, tangents: Sequence[Tensor], step: float) -> tuple[Any, Any]:
    shift = iter(tangents)
    return tree_map_only(
        Active,
        lambda a: Active(a.value + step * next(shift)),
        (reference.args, reference.kwargs),
    )


def check_gram(node: Node, reference_args: Any, samples: int, index: int, rows: int = 3) -> None:
    """`gram` against per-sample gradients, each made by an autograd pass of its own."""
    function, args, kwargs = reference_args
    reference = Reference(function, args, kwargs)
    (y,) = reference(*reference.values)
    assert len(y) == samples
    deltas = normal(rows, *y.shape, seed=20)
    gradients = []
    for j in range(rows):
        for n in range(samples):
            alone = torch.zeros_like(y)
            alone[n] = deltas[j, n]
            gradients.append(reference.pull([alone])[1][index].reshape(-1))
    whole = torch.stack(gradients)
    found = node.gram(deltas, index)
    assert found is not None
    torch.testing.assert_close(found, whole @ whole.mT, **FIRST)


def _floating(result: Any) -> list[Tensor]:
    leaves = tree_leaves(result)
    return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


def _masks(count: int) -> list[list[bool]]:
    """All wanted, and each alone."""
    alone = [[i == j for j in range(count)] for i in range(count)] if count > 1 else []
    return [[True] * count, *alone]


def _or_zero(found: Tensor | None, like: Tensor, i: int) -> Tensor:
    return torch.zeros_like(like) if found is None else found[i]


def _grad(y: Any, x: Any, seeds: Any, graph: bool) -> list[Tensor]:
    if not y:
        return [torch.zeros_like(part) for part in x]
    parts = torch.autograd.grad(
        y, x, seeds, create_graph=graph, retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(a) if g is None else g for g, a in zip(parts, x, strict=True)]
