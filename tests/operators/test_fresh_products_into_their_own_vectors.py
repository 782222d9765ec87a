"""Products that are written to memory which holds the vectors."""

import pytest
import torch
from llqr_mf.operators.compiled import compiled
from small_models import mlp, normal

import llqr_mf as lq


def hessian_of(columns=None):
    problem = lq.LQRProblem.from_network(
        lq.split(mlp(4, 6, 3)),
        normal(8, 4, seed=1),
        torch.arange(8) % 3,
        loss="cross_entropy",
        damping=0.5,
        columns=columns,
    )
    return problem.hessian


@pytest.mark.parametrize("columns", [None, 2])
@pytest.mark.parametrize("kind", ["plain", "compiled"])
def test_out_may_lie_on_the_vectors(kind, columns):
    hessian = hessian_of(columns)
    if kind == "compiled":
        hessian = compiled(hessian, backend="eager")
    size = hessian.shape[0]
    v = normal(3, size, seed=2)
    wanted = hessian.multiply_rows(v)
    itself = v.clone()
    assert hessian.multiply_rows(itself, out=itself) is itself
    torch.testing.assert_close(itself, wanted, rtol=1e-12, atol=0)
    for shift in (1, 2):  # rows of one are later rows of the other
        block = torch.cat([v, normal(shift, size, seed=4)])
        hessian.multiply_rows(block[:3], out=block[shift:])
        torch.testing.assert_close(block[shift:], wanted, rtol=1e-12, atol=0)
    apart = torch.cat([v, torch.zeros_like(v)])
    hessian.multiply_rows(apart[:3], out=apart[3:])
    torch.testing.assert_close(apart, torch.cat([v, wanted]), rtol=1e-12, atol=0)
    strided = torch.zeros(size, 3, dtype=v.dtype).mT
    torch.testing.assert_close(hessian.multiply_rows(v, out=strided), wanted, rtol=1e-12, atol=0)


def test_out_that_does_not_fit():
    hessian = hessian_of()
    v = normal(3, hessian.shape[0])
    for out in (v[:2].clone(), v.float(), v[:, 1:].clone()):
        with pytest.raises(ValueError, match=r"out is .*: give torch\.float64 of shape \(3, "):
            hessian.multiply_rows(v, out=out)
