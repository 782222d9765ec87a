"""Complex numbers: parameters are refused by name, values in between are linearised exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import dense_gradient, dense_hessian_columns, dense_jacobian
from small_models import F64, normal
from torch import Tensor, nn
from torch.nn import functional as F

import llqr_mf as lq

C128 = torch.complex128


class Mixer(nn.Module):
    """A complex weight, trained or not, between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.turn = nn.Parameter(torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x).tanh() * self.turn
        return torch.cat([z.real, z.imag], 1)


class Spectral(nn.Module):
    """Real weights on the Fourier coefficients of a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)
        self.filter = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(self.inner(x).tanh()) * self.filter
        return self.outer(torch.fft.irfft(z, n=6).tanh())


class Rotary(nn.Module):
    """Pairs turned by a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.inner(x).reshape(-1, 3, 2))
        return self.outer(torch.view_as_real(pairs * self.turns).flatten(1).tanh())


class Pairs(nn.Module):
    """A complex weight held as a real one, on complex inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.view_as_real(torch.randn(4, 2, dtype=torch.complex64)))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ torch.view_as_complex(self.pairs)).abs()


X, Z = normal(5, 4, seed=1), torch.complex(normal(5, 4, seed=2), normal(5, 4, seed=3))


def wide(build: Callable[[], nn.Module]) -> nn.Module:
    """In float64; `Module.to` would drop imaginary parts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()._apply(lambda t: t.to(C128 if t.is_complex() else F64))


def frozen() -> nn.Module:
    made = wide(Mixer)
    made.turn.requires_grad_(False)
    return made


MAKERS = {
    "problem": lambda m: lq.LQRProblem.from_network(lq.split(m), X, normal(5, 6), loss="mse"),
    "stream": lambda m: lq.StreamedProblem(lq.split(m), [(X, normal(5, 6))], loss="mse"),
    "kernel": lambda m: lq.gaussian_process.NeuralTangentKernel(m)(X).to_dense(),
    "optimizer": lambda m: lq.LLQR(m, torch.optim.SGD([m.inner.weight], 0.1), loss="mse"),
    "structure": lq.Diagonal,
    "mapping": lambda m: lq.Diagonal({"turn": m.turn.detach()}),
}


@pytest.mark.parametrize("name", MAKERS)
def test_complex_parameters_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"parameter 'turn' is torch.complex128.*view_as_real"):
        MAKERS[name](wide(Mixer))


@pytest.mark.parametrize("name", ["frozen", "spectral", "rotary", "pairs"])
def test_complex_values_in_between_are_exact(name: str) -> None:
    model, inputs = {
        "frozen": (frozen(), X),
        "spectral": (wide(Spectral), X),
        "rotary": (wide(Rotary), X),
        "pairs": (wide(Pairs), Z),
    }[name]
    width = model(inputs).shape[1]
    y = normal(5, width, seed=4)
    options = {"loss": "mse", "damping": 0.0}
    layers = lq.split(model)
    plain = lq.LQRProblem.from_network(layers, inputs, y, **options)
    newton = lq.LQRProblem.from_network(layers, inputs, y, metric="newton", **options)

    def loss(output: Tensor) -> Tensor:
        return F.mse_loss(output, y)

    J, eye = dense_jacobian(model, inputs), torch.eye(plain.size, dtype=F64)
    # Sums of at most 40 float64 numbers of one size, in another order.
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(plain.gradient, dense_gradient(model, inputs, loss), **close)
    torch.testing.assert_close(plain.hessian.to_dense(), 2 / y.numel() * J.mT @ J, **close)
    whole = dense_hessian_columns(model, inputs, loss, eye)
    torch.testing.assert_close(newton.hessian.to_dense(), whole, **close)


def test_complex_outputs_are_refused_with_the_remedy() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(self.inner(x))

    layers = lq.split(wide(Waves))
    for targets in (torch.zeros(5, 4, dtype=C128), normal(5, 4)):
        with pytest.raises(ValueError, match=r"outputs are torch.complex128.*view_as_real"):
            lq.LQRProblem.from_network(layers, X, targets, loss="mse")
