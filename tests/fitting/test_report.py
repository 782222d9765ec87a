"""A report leaves the process: as JSON with a version, and as an exact copy."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from small_models import mlp, normal

import llqr_mf as lq


@pytest.fixture(scope="module")
def report():
    net = mlp(4, 5, 3)
    problems = [
        lq.LQRProblem.from_network(
            *(lq.split(net), normal(8, 4, seed=s), torch.arange(8) % 3),
            loss="cross_entropy",
            damping=1e-2,
        )
        for s in range(2)
    ]
    return lq.fit(lq.Diagonal(net), problems)


def test_json_names_its_version(report):
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["version"] == 1 and told["method"] == "cg"
    assert told["objective"] == report.objective and "preconditioner" not in told


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_exact(report, how):
    other = how(report)
    assert other.to_dict() == report.to_dict()
    for name, tensor in report.preconditioner.tensors.items():
        assert torch.equal(other.preconditioner.tensors[name], tensor)
        assert other.preconditioner.tensors[name] is not tensor
