"""The condensed Hessian with its products run through torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixFreeOperator
from .condensed_hessian import CondensedHessianOperator
from .fresh import fresh_rows, into
from .tangent import is_plain
from .traced import trace_product

Graph = Callable[[Tensor, Tensor], Any]


def compiled(
    hessian: CondensedHessianOperator, *, backend: str | Callable[..., Any] = "inductor"
) -> CompiledOperator:
    """`problem.hessian` with products that torch.compile has fused.

    The first product with k rows compiles for that k, which takes from seconds to a minute;
    later ones with as many rows never compile again. It pays where a problem is multiplied
    hundreds of times, and where activations rather than GEMMs take the time.

    The product may also stand in a function of one's own under torch.compile, which takes it
    without a break on recent torch (not on 2.6); call `problem.system.check()` before it then.

    Args:
        hessian: `problem.hessian`.
        backend: As for `torch.compile`. "inductor" needs a C++ compiler on a CPU and Triton on a
            GPU; "aot_eager" needs neither and saves no time.

    Returns:
        An operator (P, P) for products and for Krylov solvers.

    Raises:
        TypeError: It is another operator.
    """
    return CompiledOperator(hessian_of("compiled", hessian)._proto, base=hessian, backend=backend)


class CompiledOperator(MatrixFreeOperator):
    """H, one compiled graph per number of rows.

    Whether the weights and the batch are those that were linearised is checked before every
    product, outside of the graph. Products under autograd or torch.func are those of `base`.

    Args:
        proto: Carries dtype and device.
        base: The plain operator.
        backend: As for `torch.compile`.
        columns: Columns per pass; None takes those of `base`.
    """

    symmetric = True

    def __init__(
        self,
        proto: Tensor,
        *,
        base: CondensedHessianOperator,
        backend: str | Callable[..., Any] = "inductor",
        columns: int | None = None,
    ) -> None:
        columns = base._columns if columns is None else columns
        super().__init__(proto, columns=columns, base=base, backend=backend)
        self.base, self.system, self.backend = base, base.system, backend
        self._graphs: dict[int, Graph] = {}

    def _sizes(self) -> tuple[int, int]:
        return self.base._sizes()

    def _rows(self, v: Tensor) -> Tensor:
        if not is_plain(v):
            return self.base._rows(v)
        return self._fill(v, fresh_rows(v, *v.shape))

    def multiply_rows(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """H times k vectors kept as rows, shape (k, P), written into `out` if it is given."""
        if out is None:
            return self.times_rows(v)
        if not is_plain(v):
            return self.base.multiply_rows(v, out)
        copied = into(self.times_rows, v, out)
        if copied is not None:
            return copied
        size = self._columns or max(1, len(v))
        for part, target in zip(v.split(size), out.split(size), strict=True):
            # Memory that both are views of would be guarded, and compiled for, case by case.
            if target.is_contiguous() and not _share_memory(part, target):
                self._fill(part, target)
            else:
                target.copy_(self._rows(part))
        return out

    def _rows_into(self, v: Tensor, out: Tensor) -> Tensor:
        return self.multiply_rows(v, out)

    def _fill(self, v: Tensor, out: Tensor) -> Tensor:
        self.system.check()
        # The compiler would compile again for tensors that are inference_mode's own.
        with torch.inference_mode(False), torch.no_grad():
            given = (v.clone() if v.is_inference() else v.detach()).contiguous()
            result = torch.empty_like(given) if out.is_inference() else out.detach()
            if len(v) not in self._graphs:
                self._graphs[len(v)] = self._compile(len(v))
            self._graphs[len(v)](given, result)
        return out.copy_(result) if out.is_inference() else out

    def _compile(self, k: int) -> Graph:
        graph = trace_product(self.system, k, in_place=False)
        run: Graph = torch.compile(
            graph.forward, fullgraph=True, dynamic=False, backend=self.backend
        )
        # One's own generator: drawing from torch's would change the dropout masks.
        generator = torch.Generator(self.device).manual_seed(0)
        probe = torch.randn(
            k, self._sizes()[0], dtype=self.dtype, device=self.device, generator=generator
        )
        found = torch.empty_like(probe)
        try:
            with warnings.catch_warnings():
                # The compiler's own, about torch's inside: a user can do nothing about them.
                warnings.simplefilter("ignore")
                run(probe, found)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"torch.compile with backend={self.backend!r} failed ({_beginning(error)}). "
                "Inductor needs a C++ compiler (g++ or clang++, or its path in CXX) on a CPU and "
                "Triton on a GPU: install it, use backend='aot_eager', or multiply by the plain "
                "problem.hessian."
            ) from error
        self._compare(found, self.system.condensed_product(probe))
        return run

    def _compare(self, found: Tensor, wanted: Tensor) -> None:
        """The graph holds only what torch saw: numbers made elsewhere would be frozen in it."""
        scale = float(wanted.norm())
        miss = float(found.sub_(wanted).norm())
        if scale < float("inf") and not miss <= torch.finfo(self.dtype).eps ** 0.5 * scale:
            raise RuntimeError(
                f"the compiled product is off by {miss / max(scale, 1e-300):.1e} of the plain one. "
                "A call may compute outside of torch's operators (NumPy, a kernel of one's own), "
                "which a graph cannot follow: rewrite it, or use the plain problem.hessian."
            )


def hessian_of(function: str, hessian: Any) -> CondensedHessianOperator:
    """Its argument, if it is what `problem.hessian` gives.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(hessian, CondensedHessianOperator):
        raise TypeError(
            f"{function} takes problem.hessian, a CondensedHessianOperator, and was given a "
            f"{type(hessian).__name__}: only the condensed product is one graph."
        )
    return hessian


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _beginning(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()[:50])
