"""Weights and buffers that others were put in place of are as changed as those written to."""

import pytest
import torch
from small_models import normal, seeded
from torch import nn

import llqr_mf as lq
from llqr_mf.gaussian_process import Laplace

X, Y = normal(9, 4), torch.arange(9) % 3


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def replace_buffer(model, factor):
    model[1].running_var = model[1].running_var * factor


def replace_parameter(model, factor):
    model[0].weight = nn.Parameter(model[0].weight.detach() * factor)


def assign(model, factor):
    state = {name: t * factor if t.ndim else t for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [replace_buffer, replace_parameter, assign])
def test_a_stream_and_a_posterior_notice(change):
    model = seeded(net).double().eval()
    layers = lq.split(model)
    options = {"loss": "cross_entropy", "damping": 0.1}
    streamed = lq.StreamedProblem(layers, [(X[:4], Y[:4]), (X[4:], Y[4:])], **options)
    posteriors = [
        Laplace(given) for given in (streamed, lq.LQRProblem.from_network(layers, X, Y, **options))
    ]
    v = normal(streamed.size, seed=3)
    product, means = streamed.hessian @ v, [p.predict(X).mean for p in posteriors]
    # Others of the same numbers are no change.
    change(model, 1.0)
    torch.testing.assert_close(streamed.hessian @ v, product, rtol=0, atol=0)
    change(model, 2.0)
    with pytest.raises(RuntimeError, match="make a new problem"):
        streamed.hessian @ v
    for posterior in posteriors:
        with pytest.raises(RuntimeError, match="make a new problem"):
            posterior.predict(X)
    change(model, 1 / 2.0)
    for posterior, mean in zip(posteriors, means, strict=True):
        torch.testing.assert_close(posterior.predict(X).mean, mean, rtol=0, atol=0)
