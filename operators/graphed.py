"""The condensed Hessian with its product captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import MatrixFreeOperator
from .compiled import hessian_of
from .condensed_hessian import CondensedHessianOperator
from .fresh import into
from .tangent import is_plain
from .traced import trace_product

WARM_UPS = 3
"""Runs before the capture, in which cuBLAS, cuDNN and the allocator set themselves up."""


def graphed(hessian: CondensedHessianOperator, columns: int = 1) -> GraphedOperator:
    """`problem.hessian` with a product that is launched as one CUDA graph.

    This saves the launches of single kernels, which is most of the time of small networks on a
    GPU. The product is captured here, once; it keeps the intermediate tensors of one pass of
    `columns` columns and two blocks of rows for as long as the operator lives.

    Args:
        hessian: `problem.hessian` of a problem on a CUDA device.
        columns: Rows per replay. Fewer are filled up with zeros at full cost; more are replayed
            in turn.

    Returns:
        An operator (P, P) for products and for Krylov solvers. Use it from one stream at a time.

    Raises:
        TypeError: It is another operator.
        ValueError: The problem is not on a CUDA device, or `columns` is not positive.
        RuntimeError: A call of the network cannot be captured.
    """
    proto = hessian_of("graphed", hessian)._proto
    if columns < 1:
        raise ValueError(f"columns is {columns}: give at least 1.")
    if proto.device.type != "cuda":
        raise ValueError(
            f"the problem is on {proto.device} and CUDA graphs are for CUDA devices: use "
            "compiled(problem.hessian), or problem.hessian itself."
        )
    return GraphedOperator(proto, base=hessian, columns=columns)


class GraphedOperator(MatrixFreeOperator):
    """H, replayed from a CUDA graph with static buffers.

    Whether the weights and the batch are those that were linearised is checked before every
    replay. Products under autograd or torch.func are those of `base`.

    Args:
        proto: Carries dtype and device.
        base: The plain operator.
        columns: Rows per replay.
    """

    symmetric = True

    def __init__(
        self, proto: Tensor, *, base: CondensedHessianOperator, columns: int | None = 1
    ) -> None:
        columns = columns or 1
        super().__init__(proto, columns=columns, base=base)
        self.base, self.system = base, base.system
        # Buffers made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._input = proto.new_zeros(columns, self._sizes()[0])
            self._output = torch.zeros_like(self._input)
            # The traced graph leaves out autograd, which would run on the streams of the forward
            # pass rather than on the one that is captured. It owns what the capture points to.
            self._traced = trace_product(self.system, columns, in_place=True)
            self._replay = capture(
                lambda: self._traced(self._input, self._output), self._input.device
            )

    def _sizes(self) -> tuple[int, int]:
        return self.base._sizes()

    def _rows(self, v: Tensor) -> Tensor:
        if not is_plain(v):
            return self.base._rows(v)
        return self._run(v).clone()

    def multiply_rows(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """H times k vectors kept as rows, shape (k, P), written into `out` if it is given."""
        if out is None:
            return self.times_rows(v)
        if not is_plain(v):
            return self.base.multiply_rows(v, out)
        copied = into(self.times_rows, v, out)
        if copied is not None:
            return copied
        size = len(self._input)
        for part, target in zip(v.split(size), out.split(size), strict=True):
            target.copy_(self._run(part))
        return out

    def _rows_into(self, v: Tensor, out: Tensor) -> Tensor:
        return self.multiply_rows(v, out)

    @torch.no_grad()
    def _run(self, v: Tensor) -> Tensor:
        """A view of the static output; the next replay overwrites it."""
        self.system.check()
        k = len(v)
        self._input[:k].copy_(v)
        self._input[k:].zero_()
        self._replay()
        return self._output[:k]


def capture(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The function's kernels as one CUDA graph, warmed up on a side stream; call it to replay.

    Raises:
        RuntimeError: Something in it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(side)
        try:
            # Other threads (a data loader that pins memory) may go on with their own work.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the product cannot be captured in a CUDA graph ({error}): a call copies from "
                "the CPU or waits for the device, such as indexing by a mask. Rewrite it, or use "
                "compiled(problem.hessian) or problem.hessian itself."
            ) from error
    return graph.replay
