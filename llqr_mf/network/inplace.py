"""Calls that overwrite a tensor, turned into calls that return a new one."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_OUT_OF_PLACE: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in (
        *["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"],
        *["and", "or", "xor", "lshift", "rshift"],
    )
}

_PARTS = {"chunk", "split", "unbind", "tensor_split", "hsplit", "vsplit", "split_with_sizes"}

_VIEWS = _PARTS | {
    *["getitem", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel"],
    *["transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "adjoint"],
    *["squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "select", "narrow", "unfold"],
    *["diagonal", "as_strided", "real", "imag", "detach", "getattr", "contiguous", "positive"],
    *["to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "dropout"],
}
"""Calls whose result may share memory with their input."""


def make_out_of_place(graph: fx.Graph) -> set[str] | None:
    """Turns calls that overwrite their first argument into calls that return it.

    Later readers of the overwritten value read the result instead, as they would have.

    Returns:
        None, or, if a call overwrites memory that another value shares and a later call reads,
        the modules that those calls are in.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _overwrites(node) or not isinstance(node.args[0], fx.Node):
            continue
        target = node.args[0]
        # A view made later is made of the result.
        sharers = {sharer for sharer in _sharers(target) if order[sharer] < order[node]}
        readers = {
            user
            for sharer in sharers
            for user in sharer.users
            if order[user] > order[node] and not _is_part_of(user, sharer)
        }
        if readers:
            return {n.meta["owner"] for n in (node, target, *sharers, *readers)}
        for user in [user for user in target.users if order[user] > order[node]]:
            user.replace_input_with(target, node)
        _replace(node)
    return None


def on_copy(function: Any, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An overwriting function or method applied to a copy."""
    copy = target.clone()
    if isinstance(function, str):
        return getattr(copy, function)(*args, **kwargs)
    return function(copy, *args, **kwargs)


def _sharers(target: fx.Node) -> Iterator[fx.Node]:
    """Other values that may share memory with a value: its bases, and the views of them."""
    chain = [target]
    while _is_view(chain[-1]) and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    for below, base in zip([None, *chain], chain, strict=False):
        if base is not target:
            yield base
        # The parts that chunk and its like return do not overlap.
        if below is None or _name(base) not in _PARTS:
            for user in base.users:
                if user is not below and _is_view(user):
                    yield from _views_of(user)


def _views_of(node: fx.Node) -> Iterator[fx.Node]:
    waiting = [node]
    while waiting:
        view = waiting.pop()
        yield view
        waiting.extend(filter(_is_view, view.users))


def _is_part_of(user: fx.Node, sharer: fx.Node) -> bool:
    return _name(sharer) in _PARTS and user.target is operator.getitem


def _is_view(node: fx.Node) -> bool:
    return node.op.startswith("call") and bool(node.args) and _name(node) in _VIEWS


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _overwrites(node: fx.Node) -> bool:
    if node.op not in ("call_method", "call_function") or not node.args:
        return False
    name = _name(node)
    if node.target in _OUT_OF_PLACE or bool(_get_argument(node, "inplace")):
        return True
    if not name.endswith("_") or name.endswith("__"):
        return False
    if node.op == "call_method":
        return hasattr(Tensor, name)
    return getattr(node.target, "__module__", None) in ("torch", F.__name__, "torch._C._nn") or (
        getattr(torch, name, None) is node.target
    )


def _replace(node: fx.Node) -> None:
    """Puts the call that returns a new tensor in place of the overwriting one."""
    base = _name(node)[:-1]
    function = getattr(torch, base, getattr(F, base, None))
    if node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
    elif _get_argument(node, "inplace"):
        _set_argument(node, "inplace", False)
    elif node.op == "call_method" and callable(getattr(Tensor, base, None)):
        node.target = base
    elif node.op == "call_function" and callable(function):
        node.target = function
    else:
        node.args = (node.target, *node.args)  # type: ignore[arg-type]
        node.op, node.target = "call_function", on_copy


def _signature(node: fx.Node) -> inspect.Signature | None:
    try:
        return inspect.signature(node.target)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _get_argument(node: fx.Node, name: str) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    signature = _signature(node)
    if signature is None or name not in signature.parameters:
        return None
    position = list(signature.parameters).index(name)
    return node.args[position] if position < len(node.args) else None


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    if name in node.kwargs:
        node.update_kwarg(name, value)
    else:
        signature = _signature(node)
        assert signature is not None
        node.update_arg(list(signature.parameters).index(name), value)
