"""Which loss, metric, structure and recipe go together."""

from __future__ import annotations

from typing import Any

from ..losses import Loss, get_loss
from ..losses.callable import CallableLoss
from ..metrics import Metric, get_metric
from ..metrics.fisher import Fisher
from ..metrics.kl import KL
from ..metrics.newton import Newton
from ..metrics.renyi import Renyi
from ..metrics.reverse_kl import ReverseKL
from ..preconditioners.base import Structure
from ..preconditioners.diagonal import Diagonal
from ..preconditioners.direct_sum import leaves
from ..preconditioners.ekronecker import EKronecker
from ..preconditioners.identity import Identity
from ..preconditioners.kronecker import Kronecker
from ..preconditioners.low_rank import LowRank
from .recipe import Recipe

_FROM_FACTOR = (EKronecker, Kronecker, Diagonal)
"""Structures whose closed form is made of the factor of the curvature at the output."""


def loss_and_metric(loss: Any, metric: Any) -> tuple[Loss, Metric]:
    """Those that are meant; without a metric "fisher", or "gauss_newton" for a function.

    Raises:
        ValueError: They do not go together: a function names no output distribution.
        TypeError: One is nothing that stands for a loss or a metric.
    """
    chosen = get_loss(loss)
    function = isinstance(chosen, CallableLoss)
    if metric is None:
        return chosen, get_metric("gauss_newton" if function else "fisher")
    measure = get_metric(metric)
    asks = isinstance(measure, KL | ReverseKL | Renyi)
    asks = asks or (isinstance(measure, Fisher) and measure.kind != "empirical")
    if function and asks:
        raise ValueError(
            f"metric={metric!r} is about the output distribution that a loss is the likelihood of, "
            f"and loss={loss!r} is a function, which names none: leave metric out, or give "
            "'gauss_newton', 'empirical_fisher' or 'squared_error', or one of the named losses."
        )
    return chosen, measure


def check_learnable(metric: Metric, structure: Structure, recipe: Recipe) -> None:
    """Whether a refresh can learn M from a metric's curvature.

    Raises:
        ValueError: It cannot.
    """
    newton, fitted = isinstance(metric, Newton), recipe.learn == "cg"
    if not (newton or metric.state_costs):
        return
    for part in leaves(structure):
        needs = isinstance(part, LowRank)
        needs = needs or (isinstance(part, _FROM_FACTOR) and recipe.learn != "momentum")
        # The probes of a fit are drawn from that factor, too.
        if needs or (newton and fitted and not isinstance(part, Identity)):
            what = "second derivatives of the layers" if newton else "costs on layers' outputs"
            raise ValueError(
                f"metric={metric!r} has {what}, of which Recipe(learn={recipe.learn!r}) for "
                f"'{part.kind}' knows nothing: use metric='gauss_newton', or structure='scalar' or "
                "'identity' with learn='closed_form'."
            )
