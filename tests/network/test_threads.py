"""Several threads at once: what torch keeps for the whole process is put back, and not mixed up."""

import sys
import threading

import pytest
import torch
from small_models import mlp, normal
from torch import nn
from torch.nn import functional as F

import llqr_mf as lq
from llqr_mf.network.modes import curvature_pass

X, Y = normal(6, 4), torch.arange(6) % 3


def flags():
    cuda = torch.backends.cuda
    return (
        *(nn.Module.__call__, nn.Module.__getattr__, torch.autograd.Function.__dict__["apply"]),
        *(torch.backends.mha.get_fastpath_enabled(), cuda.flash_sdp_enabled()),
        *(cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), torch.is_grad_enabled()),
    )


def at_once(*work):
    """Runs functions in threads; what they raise is raised."""
    errors = []

    def run(each):
        try:
            each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # take turns as often as can be
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def test_splits_and_problems_leave_torch_as_it_was():
    before, random = flags(), torch.get_rng_state()
    models = [mlp(4, 6, 3, seed=seed) for seed in range(2)]

    def work(model):
        for _ in range(10):
            lq.LQRProblem.from_network(lq.split(model), X, Y, loss="cross_entropy")

    at_once(*(lambda model=model: work(model) for model in models))
    assert flags() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_another_thread_runs_meanwhile_gives_tensors():
    model, other = mlp(4, 6, 3), mlp(4, 8, 3, seed=1, activation=nn.PReLU)
    wanted, done = other(X), threading.Event()

    def train():
        while not done.is_set():
            assert torch.equal(other(X), wanted)

    def split():
        try:
            for _ in range(30):
                lq.split(model)
        finally:
            done.set()

    at_once(train, split)


def test_passes_that_overlap_put_the_flags_of_before_back():
    before, first, second = flags(), threading.Barrier(2), threading.Event()

    def early():
        first.wait()
        with curvature_pass(torch.device("cpu")):
            second.wait(0.1)  # the other one has come by now, and waits

    def late():
        first.wait()
        with curvature_pass(torch.device("cpu")):
            second.set()

    at_once(early, late)
    assert flags() == before


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_checkpointed_attention_in_a_module_that_stays_whole(metric):
    """The backward pass runs the module's code again, and must meet the same kernel there."""

    class Net(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.again = again
            self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def attend(self, h):
            h = self.inner(h).view(-1, 1, 2, 4)
            return F.scaled_dot_product_attention(h, h, h).reshape(-1, 8)

        def forward(self, x):
            assert x.dim() == 2  # not to be traced
            h = torch.tanh(self.first(x))
            if self.again:
                h = torch.utils.checkpoint.checkpoint(self.attend, h, use_reentrant=False)
            else:
                h = self.attend(h)
            return self.last(h)

    made = []
    for again in (False, True):
        torch.manual_seed(0)
        model = Net(again).double()
        problem = lq.LQRProblem.from_network(
            lq.split(model), X, Y, loss="cross_entropy", metric=metric, damping=0.0
        )
        v = normal(problem.size, 2, seed=3)
        made.append((problem.gradient, problem.hessian @ v))
    for plain, again in zip(*made, strict=True):
        assert torch.equal(plain, again)
