"""A product as one flat graph of torch operators, for a compiler or a CUDA graph to take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .system import System


def trace_product(system: System, columns: int, *, in_place: bool) -> GraphModule:
    """The condensed product H u of `columns` rows, recorded operator by operator.

    Recording runs the product once, so it sees through autograd graphs and `torch.func`, which
    torch.compile cannot enter. The graph shares the memory of the weights and activations.

    Args:
        system: The linear-quadratic system.
        columns: k, fixed in the graph.
        in_place: Whether products are written into the buffer block by block, or into it at the
            end only, as compilers want it.

    Returns:
        A function of rows u and a buffer, both (k, P) and contiguous, which fills the buffer.

    Raises:
        RuntimeError: A call's product cannot be recorded, or as `System.check`.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def product(u: Tensor, out: Tensor) -> Tensor:
        if in_place:
            return system.condensed_product(u, out)
        return out.copy_(system.traceable_product(u))

    system.check()
    with torch.no_grad():
        rows = system.proto.new_zeros(columns, system.control_size)
        try:
            graph = make_fx(product)(rows, torch.empty_like(rows))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"the product of {_call_behind(error)} cannot be recorded as a graph ({error}): "
                "write that call in torch operations, without .item(), NumPy or branches on "
                "values, or use the plain problem.hessian."
            ) from error
        for name in {node.target for node in graph.graph.nodes if node.op == "get_attr"}:
            value = getattr(graph, str(name))
            if isinstance(value, Tensor):
                delattr(graph, str(name))
                setattr(graph, str(name), value.detach())
    return graph


def _call_behind(error: BaseException) -> str:
    """The linearised call that a product was in when it failed, by its name."""
    name, trace = "a call", error.__traceback__
    while trace is not None:
        bound: Any = trace.tb_frame.f_locals.get("bound")
        name = getattr(bound, "name", name)
        trace = trace.tb_next
    return name
