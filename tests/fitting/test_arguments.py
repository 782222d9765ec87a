"""Arguments that do not fit are named, with the remedy, before anything changes."""

from __future__ import annotations

import pytest
import torch
from fitting.dense_fit import LAYERS, problem
from small_models import mlp, normal

import llqr_mf as lq
from llqr_mf.fitting import FitReport, fit
from llqr_mf.fitting.authors_ekronecker import AuthorsEKronecker
from llqr_mf.preconditioners import Diagonal, Identity


@pytest.mark.parametrize(
    "options, match",
    [
        ({"method": "sgd"}, "method"),
        ({"probes": "noise"}, "probes"),
        ({"probes": torch.zeros(2, 30)}, "shape"),
        ({"probes": [torch.zeros(2, 31)] * 3}, "3 blocks"),
        ({"count": 0}, "count"),
        ({"count": 100}, "micro-batches"),
        ({"isotropic": 1.0}, "isotropic"),
        ({"anchor": -1.0}, "anchor"),
        ({"floor": 0.0}, "floor"),
        ({"sweeps": 0}, "sweeps"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"method": "momentum", "probes": "curvature"}, "probes"),
        ({"method": "momentum", "anchor": 0.1}, "anchor"),
        ({"method": "momentum", "steps": 0}, "steps"),
        ({"method": "momentum", "ema": 1.0}, "ema"),
    ],
)
def test_bad_options_are_named_and_nothing_changes(options, match) -> None:
    M = Diagonal(problem(0))
    before = M.flat()
    with pytest.raises(ValueError, match=match):
        fit(M, problem(0), **options)
    assert torch.equal(M.flat(), before)


def test_what_cannot_be_fitted_is_named() -> None:
    one = problem(0)
    with pytest.raises(ValueError, match="Identity has nothing to fit"):
        fit(Identity(one), one)
    with pytest.raises(ValueError, match="momentum"):
        fit(AuthorsEKronecker(one), one)
    with pytest.raises(ValueError, match="empty"):
        fit(Diagonal(one), [])
    with pytest.raises(TypeError, match="Linear"):
        fit(Diagonal(one), [torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="parameters of M"):
        fit(Diagonal(mlp(3, 5, 3)), one)
    streamed = lq.StreamedProblem(
        LAYERS, [(normal(4, 3), torch.arange(4) % 3)], loss="cross_entropy"
    )
    with pytest.raises(ValueError, match="StreamedProblem"):
        fit(Diagonal(one), streamed, probes="curvature")
    with pytest.raises(ValueError, match="StreamedProblem"):
        fit(Diagonal(one), streamed, count=2)
    assert isinstance(fit(Diagonal(one), streamed), FitReport)
