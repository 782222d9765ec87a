"""Quadratic forms u'f(A)u by the Lanczos process and Gauss rules.

The tridiagonal matrix T of m Lanczos steps from u is the Gauss rule with m nodes of the measure
with which u sees the spectrum of A: its eigenvalues are the nodes, and the squared first entries
of its eigenvectors the weights (Golub and Meurant 2010, chapters 3, 4 and 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .dots import row_dots, row_norms, update_rows
from .krylov import per_row
from .product import RowProduct, multiply

BREAKDOWN = 10
"""A residual of less than this many roundings of T ends a Lanczos run: the space is invariant."""

SLACK = 100
"""Roundings of T by which an eigenvalue may lie beyond a bound that is kept."""

WEAK = 1e-3
"""The largest coupling, in units of T, with which a single step says anything of the next."""

TINY = 1e-280
"""What T is moved by where it is zero, so that nothing is divided by zero."""


@dataclass(frozen=True, eq=False)
class Tridiagonals:
    """What c Lanczos runs leave.

    A run that met an invariant subspace after fewer than m steps is padded: off-diagonal zeros
    separate the padding, whose diagonal lies in the range of A, so it has no weight in any rule.

    Attributes:
        diagonal: float64, shape (c, m).
        off: The off-diagonals, not negative; float64, shape (c, m - 1).
        coupling: What would couple the next step, zero where the space is invariant, so that
            T is all that u sees of A; float64, shape (c,).
        square: u'u of the starts as given, by which rules of unit mass are multiplied; (c,).
        rounding: Relative rounding of the products.
    """

    diagonal: Tensor
    off: Tensor
    coupling: Tensor
    square: Tensor
    rounding: float

    def rule(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights of unit mass; shapes (c, m), (c, m)."""
        return gauss(self.diagonal, self.off)

    def form(
        self, function: Callable[[Tensor], Tensor], *, lower: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Values u'f(A)u and how far off they may be; see `bracket`. Shapes (c,), (c,)."""
        value, error = bracket(
            self.diagonal,
            self.off,
            function,
            lower=lower,
            coupling=self.coupling,
            rounding=self.rounding,
        )
        return value * self.square, error * self.square


@torch.no_grad()
def tridiagonalize(
    operator: RowProduct, rows: Tensor, steps: int, *, reorthogonalize: bool = True
) -> Tridiagonals:
    """Lanczos runs from c starts that are multiplied together, each in a Krylov space of its own.

    Products run in the dtype of the rows, vectors in that or float32 if it is narrower, dot
    products in float64. The device is read once per step.

    Memory, in blocks (c, n): with `reorthogonalize` the basis, made at once, `steps` of them, and
    three more; without it three, and one that the operator makes. Without it orthogonality is lost
    as eigenvalues converge, and copies of these appear in T; the weights of the copies add up to
    the right one, so rules suffer little (Greenbaum 1989), though more steps may be needed.

    Args:
        operator: A, symmetric: an operator, or a function of rows (c, n).
        rows: The starts, shape (c, n), in the dtype of the products. Overwritten.
        steps: m; n where that is less.
        reorthogonalize: Against the whole basis, twice.

    Returns:
        The tridiagonal matrices.

    Raises:
        ValueError: A start is zero or not finite, a product is not finite, or a shape or `steps`
            does not fit.
    """
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"rows have shape {tuple(rows.shape)}: give (c, n), neither of them 0.")
    if steps < 1:
        raise ValueError(f"steps is {steps}: give at least 1.")
    (c, n), dtype = rows.shape, rows.dtype
    m = min(steps, n)
    q = rows.to(torch.promote_types(dtype, torch.float32))
    eps = torch.finfo(q.dtype).eps
    square = row_dots(q, q)
    if not bool(((square > 0) & square.isfinite()).all()):
        raise ValueError("a start is zero, or it or its square is not finite.")
    q.mul_(per_row(square.rsqrt(), q))
    previous, w = torch.zeros_like(q), torch.empty_like(q)
    basis = q.new_empty(c, m, n) if reorthogonalize else None
    alphas, betas = (torch.zeros(m, c, dtype=torch.float64, device=q.device) for _ in range(2))
    beta, scale = torch.zeros_like(square), torch.zeros_like(square)
    running = torch.ones_like(square, dtype=torch.bool)
    for j in range(m):
        w.copy_(multiply(operator, q.to(dtype), None))
        update_rows(w, previous, step=-beta)
        alpha = row_dots(w, q)
        beta = update_rows(w, q, step=-alpha).sqrt()
        if basis is not None:
            basis[:, j] = q
            _orthogonalize(w, basis[:, : j + 1])
            beta = row_norms(w)
        alphas[j] = torch.where(running, alpha, alphas[0])
        scale = torch.fmax(scale, alpha.abs() + beta)
        running = running & ~(beta <= BREAKDOWN * eps * scale)
        beta = torch.where(running, beta, 0.0)
        betas[j] = beta
        # The one time in a step that the device is read.
        goes_on, finite = torch.stack([running.any(), (alpha + beta).isfinite().all()]).tolist()
        if not finite:
            raise ValueError("a product with the operator gave NaN or infinity.")
        if not goes_on:
            alphas[j + 1 :] = alphas[0]
            break
        previous, q, w = q, w, previous
        q.mul_(per_row(torch.where(running, 1 / beta, 0.0), q))
    rounding = torch.finfo(dtype).eps
    return Tridiagonals(alphas.mT, betas[:-1].mT, betas[-1], square, rounding)


def gauss(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """The Gauss rule of unit mass, exact for polynomials of degree 2 m - 1.

    Args:
        diagonal: Of T; shape (..., m).
        off: Its off-diagonal; shape (..., m - 1).

    Returns:
        Nodes, rising, and weights; float64, shapes (..., m).
    """
    nodes, vectors = torch.linalg.eigh(_dense(diagonal, off))
    weights = vectors[..., 0, :].square()
    return nodes.to(diagonal.device), weights.to(diagonal.device)


def gauss_radau(
    diagonal: Tensor,
    off: Tensor,
    node: float,
    *,
    rounding: float = torch.finfo(torch.float64).eps,
) -> tuple[Tensor, Tensor]:
    """The Gauss-Radau rule with one node fixed, exact for polynomials of degree 2 m - 2.

    The last entry of the diagonal is replaced so that `node` is an eigenvalue of T (Golub and
    Meurant 2010, section 6.2). It is moved outward by twice `SLACK` roundings of T, so that T less
    the node is definite where an eigenvalue of A lies on the bound, and stays a bound.

    Args:
        diagonal: Of T; shape (..., m). The last entry is not looked at.
        off: Its off-diagonal; shape (..., m - 1).
        node: A lower or an upper bound of the spectrum.
        rounding: Relative rounding of T.

    Returns:
        Nodes and weights; float64, shapes (..., m).

    Raises:
        ValueError: `node` lies inside the spectrum.
    """
    if diagonal.shape[-1] == 1:
        return torch.full_like(diagonal, node), torch.ones_like(diagonal)
    known, links = diagonal[..., :-1], off[..., :-1]
    ritz = torch.linalg.eigvalsh(_dense(known, links)).to(diagonal.device)
    # As large as |T| at least, and the node's own size, to which T - node is rounded.
    scale = torch.fmax(ritz.abs().amax(-1), off.abs().amax(-1)).clamp(min=max(abs(node), TINY))
    slack = SLACK * rounding * scale
    above, below = ritz[..., 0] >= node - slack, ritz[..., -1] <= node + slack
    if not bool((above | below).all()):
        raise ValueError(
            f"{node:.6g} is no bound of the spectrum: there are eigenvalues down to "
            f"{float(ritz.min()):.6g} and up to {float(ritz.max()):.6g}. Give a lower one, or None."
        )
    sign = torch.where(above, 1.0, -1.0)
    moved = node - 2 * sign * slack
    pivot = torch.ones_like(scale)
    square = torch.cat([torch.zeros_like(off[..., :1]), off.square()], -1)
    for j in range(known.shape[-1]):
        pivot = sign * (known[..., j] - moved) - square[..., j] / pivot
    # The entry is a mean of nodes, none of which is beyond the spectrum.
    pivot = pivot.clamp(min=(square[..., -1] / (10 * scale)).clamp(min=1e-300))
    last = moved + sign * square[..., -1] / pivot
    return gauss(torch.cat([known, last.unsqueeze(-1)], -1), off)


def bracket(
    diagonal: Tensor,
    off: Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    lower: float | None = None,
    coupling: Tensor | None = None,
    rounding: float = torch.finfo(torch.float64).eps,
) -> tuple[Tensor, Tensor]:
    """u'f(A)u of unit vectors u, and how far off that may be.

    With `lower`, the Gauss rule and the Gauss-Radau rule with a node there lie on the two sides of
    u'f(A)u if the even derivatives of f have one sign on [lower, inf) and the odd ones the other
    (Golub and Meurant 2010, theorems 6.3 and 6.4): log(x + c), 1 / (x + c), x / (x + c), roots,
    exp(-x). The value is the middle and the error half of what is between: a bound.

    Without it the value is that of the Gauss rule, and the error its difference from the rule of
    half the steps, an estimate that is too large where the rule converges; zero where the Krylov
    space is invariant. One step has no half. Where its coupling is known and weak, the error is
    that of the rule with a second step like the first, and else infinite.

    Args:
        diagonal: Of T; shape (..., m).
        off: Its off-diagonal; shape (..., m - 1).
        function: f, entry by entry on float64 tensors.
        lower: A lower bound of the spectrum.
        coupling: The next off-diagonal; shape (...). It gives the Radau rule one node more, whose
            weight vanishes with it. Twice the right one still gives a bound, a wider one.
        rounding: Relative rounding of T.

    Returns:
        Values and errors; float64, shapes (...).

    Raises:
        ValueError: `lower` lies inside the spectrum, or f is not finite on a node.
    """

    def integral(nodes: Tensor, weights: Tensor) -> Tensor:
        nodes = nodes if lower is None else nodes.clamp(min=lower)
        return (weights * values_on(nodes, function)).sum(-1)

    nodes, weights = gauss(diagonal, off)
    if lower is not None:
        _check_lower(lower, nodes, rounding)
    value = integral(nodes, weights)
    if lower is None:
        if diagonal.shape[-1] == 1:
            return value, _error_of_one_step(diagonal[..., 0], value, coupling, function)
        half = diagonal.shape[-1] // 2
        error = (value - integral(*gauss(diagonal[..., :half], off[..., : half - 1]))).abs()
        return value, error if coupling is None else torch.where(coupling == 0, 0.0, error)
    if coupling is not None:
        diagonal = torch.cat([diagonal, torch.zeros_like(diagonal[..., :1])], -1)
        off = torch.cat([off, coupling.unsqueeze(-1)], -1)
    other = integral(*gauss_radau(diagonal, off, lower, rounding=rounding))
    return (value + other) / 2, (value - other).abs() / 2


def _check_lower(lower: float, nodes: Tensor, rounding: float) -> None:
    """Refuses a lower bound that a node, which is not below the spectrum, is seen to be under."""
    scale = nodes.abs().max().clamp(min=abs(lower))
    # Written so that NaN is refused, too.
    if not bool(nodes.min() >= lower - SLACK * rounding * scale):
        raise ValueError(
            f"lower={lower:.6g} is no bound of the spectrum: there are eigenvalues down to "
            f"{float(nodes.min()):.6g} and up to {float(nodes.max()):.6g}. Give a lower one, or "
            "None."
        )


def values_on(nodes: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The values of f on nodes, checked.

    Raises:
        ValueError: f gave another shape, or numbers that are not finite.
    """
    values = function(nodes)
    if values.shape != nodes.shape:
        raise ValueError(
            f"function turned a tensor of shape {tuple(nodes.shape)} into {tuple(values.shape)}: "
            "it must act entry by entry."
        )
    if not bool(values.isfinite().all()):
        wrong = float(nodes[~values.isfinite()][0])
        raise ValueError(
            f"function is not finite at {wrong:.6g}, where the operator has an eigenvalue, or at "
            "`lower`: add damping to the operator, or give a function that is defined there."
        )
    return values.double()


def _error_of_one_step(
    node: Tensor, value: Tensor, coupling: Tensor | None, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """What a second step with the same diagonal would change f(node) by, if that is little."""
    if coupling is None:
        return torch.full_like(value, torch.inf)
    most = WEAK * node.abs()
    near = torch.fmin(coupling, most)
    change = (values_on(node + near, function) + values_on(node - near, function)) / 2 - value
    return torch.where(coupling <= most, change.abs(), torch.inf)


def _orthogonalize(w: Tensor, basis: Tensor) -> None:
    """Takes from each row of w (c, n) its part in the span of its own basis (c, j, n), twice."""
    column = w.unsqueeze(-1)
    for _ in range(2):
        column.baddbmm_(basis.mT, basis @ column, alpha=-1)


def _dense(diagonal: Tensor, off: Tensor) -> Tensor:
    """T, on the CPU, where small eigenproblems are quickest."""
    diagonal, off = diagonal.double().cpu(), off.double().cpu()
    return diagonal.diag_embed() + off.diag_embed(1) + off.diag_embed(-1)
