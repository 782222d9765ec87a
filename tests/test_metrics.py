"""Metrics against Hessians of the divergences they are named after."""

import dataclasses
import math

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from llqr_mf.operators.outer_curvature import OuterCurvature

from llqr_mf.losses import BCEWithLogits, CallableLoss, CrossEntropy, MeanSquaredError
from llqr_mf.metrics import (
    KL,
    CostModel,
    Divergence,
    Fisher,
    GaussNewton,
    Metric,
    Newton,
    Renyi,
    ReverseKL,
    SquaredError,
    StateCosts,
    get_metric,
    metric_names,
)

F64 = torch.float64
EPS = torch.finfo(F64).eps


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    """Equal up to rounding: 100 operations in a row on numbers as large as one or b's largest."""
    scale = max(1.0, float(b.detach().abs().max()))
    torch.testing.assert_close(a, b, rtol=0, atol=100 * EPS * scale)


def hessian_of(function, outputs):
    return torch.func.hessian(function)(outputs).reshape(outputs.numel(), -1)


# A loss, a batch, and what turns outputs into torch's own distribution of one draw. Divergences
# are taken between distributions written out here, not between losses.

WIDTH = 3
VARIANCE = WIDTH / 2


def categorical(x):
    return x.softmax(-1)


def bernoulli(x):
    return torch.stack([torch.sigmoid(-x), torch.sigmoid(x)], -1)


DISCRETE = {
    "categorical": (CrossEntropy(), normal(4, WIDTH), torch.tensor([0, 2, 1, 1]), categorical),
    "sequence": (
        CrossEntropy(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1),
        normal(2, 2, WIDTH),
        torch.tensor([[0, 2], [1, 1]]),
        categorical,
    ),
    "bernoulli": (
        BCEWithLogits(pos_weight=torch.tensor(3.0)),
        normal(2, WIDTH),
        torch.ones(2, WIDTH, dtype=F64),
        bernoulli,
    ),
}
GAUSSIAN = (MeanSquaredError(), normal(4, WIDTH), normal(4, WIDTH, seed=1))
NAMED = {**DISCRETE, "gaussian": GAUSSIAN}


def discrete_kl(p, q):
    return (p * (p.log() - q.log())).sum(-1).mean()


def discrete_renyi(p, q, alpha):
    return ((p**alpha * q ** (1 - alpha)).sum(-1).log() / (alpha - 1)).mean()


def gaussian_kl(a, b):
    """Of Gaussians of one covariance, symmetric; mean over samples."""
    return ((a - b) ** 2).sum(-1).mean() / (2 * VARIANCE)


@pytest.mark.parametrize("name", DISCRETE)
def test_hessians_of_divergences_between_discrete_outputs(name):
    loss, x, y, distribution = DISCRETE[name]
    now = distribution(x)
    divergences = {
        KL(): lambda z: discrete_kl(now, distribution(z)),
        ReverseKL(): lambda z: discrete_kl(distribution(z), now),
        Renyi(): lambda z: discrete_renyi(now, distribution(z), 0.5),
        Renyi(3.0): lambda z: discrete_renyi(now, distribution(z), 3.0),
    }
    for metric, divergence in divergences.items():
        close(metric.terminal(loss, x, y).to_dense(), hessian_of(divergence, x))
        assert metric.costate(loss, x, y) is None
        close(torch.func.grad(divergence)(x), torch.zeros_like(x))
    # Alpha scales it in the other argument, too.
    other = hessian_of(lambda z: discrete_renyi(distribution(z), now, 3.0), x)
    close(Renyi(3.0).terminal(loss, x, y).to_dense(), other)
    close(Renyi(1.0).terminal(loss, x, y).to_dense(), KL().terminal(loss, x, y).to_dense())
    close(Fisher().terminal(loss, x, y).to_dense(), KL().terminal(loss, x, y).to_dense())


def test_hessians_of_divergences_between_gaussian_outputs():
    loss, x, y = GAUSSIAN
    kl = hessian_of(lambda z: gaussian_kl(x, z), x)
    for metric in (KL(), ReverseKL(), Fisher()):
        close(metric.terminal(loss, x, y).to_dense(), kl)
    # The Renyi divergence of Gaussians of one covariance is alpha times their KL divergence;
    # here from its definition, by quadrature in one output.
    alpha, grid = 0.3, torch.linspace(-12, 12, 4001, dtype=F64)

    def density(mean):
        return torch.exp(-((grid - mean) ** 2) / (2 * VARIANCE)) / math.sqrt(2 * math.pi * VARIANCE)

    def renyi(mean):
        integrand = density(x[0, 0]) ** alpha * density(mean) ** (1 - alpha)
        return torch.trapezoid(integrand, grid).log() / (alpha - 1)

    one = torch.func.hessian(renyi)(x[0, 0])
    q = Renyi(alpha).terminal(loss, x, y).to_dense()
    close(q, alpha * kl)
    # Trapezoids are exact to rounding on a function that has died out at both ends.
    torch.testing.assert_close(q[0, 0] * len(x), one, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", NAMED)
def test_gauss_newton_and_newton(name):
    loss, x, y, *_ = NAMED[name]

    def value(z):
        return loss.value(z, y)

    for metric in (GaussNewton(), Newton()):
        close(metric.terminal(loss, x, y).to_dense(), hessian_of(value, x))
    assert GaussNewton().costate(loss, x, y) is None
    close(Newton().costate(loss, x, y), torch.func.grad(value)(x))


@pytest.mark.parametrize("name", NAMED)
def test_squared_error(name):
    loss, x, y, *_ = NAMED[name]
    q = SquaredError().terminal(loss, x, y)
    close(q.to_dense(), hessian_of(lambda z: 0.5 * (z - x).square().sum() / len(x), x))
    assert SquaredError().costate(loss, x, y) is None
    # One number is stored.
    assert q.diagonal_values.untyped_storage().nbytes() == 8
    assert q.scaled(2.0).diagonal_values.untyped_storage().nbytes() == 8


# ---- Fisher


@pytest.mark.parametrize("samples", [1, 3])
def test_monte_carlo_fisher(samples):
    loss, x, y, _ = DISCRETE["categorical"]
    metric = Fisher("monte_carlo", samples=samples, seed=3)
    state = torch.get_rng_state()
    q = metric.terminal(loss, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(q, OuterCurvature) and q.rank == samples
    assert int(torch.linalg.matrix_rank(q.to_dense())) <= samples * len(x)
    v = loss.sample_gradients(x, y, samples, torch.Generator().manual_seed(3))
    expected = torch.block_diag(*[u @ u.mT for u in v]) / (samples * len(x))
    close(q.to_dense(), expected)
    other = dataclasses.replace(metric, seed=4).terminal(loss, x, y)
    assert not torch.equal(q.to_dense(), other.to_dense())


@pytest.mark.parametrize("name", NAMED)
def test_monte_carlo_fisher_is_unbiased(name):
    loss, x, y, *_ = NAMED[name]
    # One operator per seed: the seeds' draws must be as good as independent.
    draws = torch.stack(
        [Fisher("monte_carlo", seed=i).terminal(loss, x, y).to_dense() for i in range(400)]
    )
    error = draws.mean(0) - Fisher().terminal(loss, x, y).to_dense()
    # Entries that no draw has hit (p = 0.05 in 400 draws and less) have no sample deviation, so
    # the bound comes from the whole matrix: 400 draws, five standard errors.
    bound = 5 * draws.std(0).square().sum().sqrt() / math.sqrt(len(draws))
    assert float(error.norm()) <= float(bound)
    # And the test can tell a factor of two from none.
    assert float(bound) < float(Fisher().terminal(loss, x, y).to_dense().norm()) / 2


def test_empirical_fisher_is_the_outer_product_of_per_sample_gradients():
    for loss, x, y, *_ in [
        (CrossEntropy(), *DISCRETE["categorical"][1:]),
        (CrossEntropy(), normal(2, 3, WIDTH), torch.tensor([[0, -100, 1], [2, 2, 0]])),
        (CrossEntropy(label_smoothing=0.1), *DISCRETE["sequence"][1:]),
        GAUSSIAN,
        (BCEWithLogits(), normal(2, WIDTH), torch.eye(2, WIDTH, dtype=F64)),
    ]:
        q = Fisher("empirical").terminal(loss, x, y)
        assert q.rank == 1
        count = loss.count(x, y)
        expected = []
        for n in range(len(x)):
            # The summed loss of sample n: its own mean times its own count.
            one, target = x[n : n + 1], y[n : n + 1]
            own = loss.count(one, target)
            g = torch.func.grad(lambda z, t=target, k=own, f=loss: k * f.value(z, t))(one)
            expected.append(torch.outer(g.flatten(), g.flatten()) / count)
        close(q.to_dense(), torch.block_diag(*expected))


def test_empirical_fisher_does_not_depend_on_the_unit_of_class_weights():
    _, x, y, _ = DISCRETE["sequence"]
    w = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    one, other = (
        Fisher("empirical").terminal(CrossEntropy(weight=c * w), x, y).to_dense() for c in (1, 10)
    )
    close(one, other)


def test_fisher_of_a_function_is_empirical_only():
    loss = CallableLoss(lambda x, y: (x - y).square().sum(-1).mean())
    _, x, y = GAUSSIAN
    g = 2 * (x - y)
    expected = torch.block_diag(*[torch.outer(row, row) for row in g]) / len(x)
    close(Fisher("empirical").terminal(loss, x, y).to_dense(), expected)
    for metric in (Fisher(), Fisher("monte_carlo"), KL(), ReverseKL(), Renyi()):
        with pytest.raises(ValueError, match="no output distribution"):
            metric.terminal(loss, x, y)


# ---- user-given divergences


def test_divergence_is_the_hessian_where_the_arguments_coincide():
    loss, x, y, _ = DISCRETE["categorical"]

    def js(a, b):
        p, q = a.softmax(-1), b.softmax(-1)
        return (discrete_kl(p, (p + q) / 2) + discrete_kl(q, (p + q) / 2)) / 2

    q = Divergence(js).terminal(loss, x, y)
    # A distribution of C classes has C - 1 directions.
    assert q.rank == WIDTH - 1
    close(q.to_dense(), hessian_of(lambda z: js(z, x), x))
    close(q.to_dense(), KL().terminal(loss, x, y).to_dense() / 4)
    # Zero but for rounding, unless said.
    rounding = Divergence(js).costate(loss, x, y)
    assert rounding is None or float(rounding.abs().max()) < 100 * EPS
    assert Divergence(js, stationary=True).costate(loss, x, y) is None


def test_costate_of_a_divergence():
    loss, x, y = GAUSSIAN
    square = Divergence(lambda a, b: (a - b).square().sum(-1).mean())
    assert square.costate(loss, x, y) is None
    assert Divergence(square.fn, stationary=False).costate(loss, x, y) is not None
    tilted = Divergence(lambda a, b: (a.exp() - b).sum(-1).mean())
    close(tilted.costate(loss, x, y), x.exp() / len(x))
    assert Divergence(lambda a, b: b.mean()).costate(loss, x, y) is None
    with torch.inference_mode():
        held = x + 0
        close(tilted.costate(loss, held, y), x.exp() / len(x))
        close(tilted.terminal(loss, held, y).to_dense(), torch.diag(x.exp().flatten()) / len(x))


def test_divergence_errors():
    loss, x, y = GAUSSIAN
    with pytest.raises(ValueError, match=r"returned shape \(4, 3\).*mean over the samples"):
        Divergence(lambda a, b: a - b).terminal(loss, x, y)
    with pytest.raises(ValueError, match=r"returned shape \(4, 3\)"):
        Divergence(lambda a, b: a - b).costate(loss, x, y)
    for fn in (
        lambda a, b: (a - b).square().sum(-1).sqrt().pow(2).mean(),
        lambda a, b: (a - b).norm(dim=-1).square().mean(),
    ):
        with pytest.raises(ValueError, match=r"NaN or infinite.*without roots"):
            Divergence(fn).terminal(loss, x, y)


# ---- intermediate layers


def test_state_costs_carry_and_delegate():
    loss, x, y, _ = DISCRETE["categorical"]
    given = {"layers.0": 0.1, 2: DiagLinearOperator(torch.ones(4)), 3: torch.eye(2), 4: 1}
    metric = StateCosts(given)
    assert metric.base == GaussNewton()
    model = metric.cost_model(loss, x, y)
    assert isinstance(model, CostModel) and dict(model.state_costs) == given
    close(model.terminal.to_dense(), GaussNewton().terminal(loss, x, y).to_dense())
    assert model.costate is None

    newton = StateCosts({0: 1.0}, base=Newton()).cost_model(loss, x, y)
    close(newton.costate, loss.gradient(x, y))
    nested = StateCosts({0: 1.0}, base=StateCosts({1: 2.0}, base=KL()))
    assert dict(nested.state_costs) == {0: 1.0, 1: 2.0}
    assert dict(KL().state_costs) == {}

    given["later"] = 1.0
    assert "later" not in metric.state_costs
    with pytest.raises(TypeError):
        metric.state_costs["later"] = 1.0


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: StateCosts({0: -1.0}), ValueError, r"cost 0 is -1\.0.*mu >= 0"),
        (lambda: StateCosts({0: math.nan}), ValueError, r"finite mu"),
        (lambda: StateCosts({0: torch.ones(2, 3)}), ValueError, r"must be square"),
        (lambda: StateCosts({0: torch.tensor(1.0)}), ValueError, r"must be square"),
        (lambda: StateCosts({0: torch.tensor([[1.0, 1], [0, 1]])}), ValueError, r"symmetric"),
        (lambda: StateCosts({0: "big"}), TypeError, r"is a str.*mu"),
        (lambda: StateCosts({0: True}), TypeError, r"is a bool"),
        (lambda: StateCosts({-1: 1.0}), ValueError, r"counted from 0"),
        (lambda: StateCosts({1.5: 1.0}), TypeError, r"name or its index"),
        (lambda: StateCosts({0: 1.0}, base="newton"), TypeError, r"give a Metric"),
        (
            lambda: StateCosts({0: 1.0}, base=StateCosts({0: 1.0})).state_costs,
            ValueError,
            r"both.*\['0'\]",
        ),
        (lambda: Renyi(0.0), ValueError, r"alpha of Renyi is 0\.0.*alpha > 0"),
        (lambda: Renyi(-1.0), ValueError, r"finite alpha > 0"),
        (lambda: Renyi(math.inf), ValueError, r"finite alpha > 0"),
        (lambda: Fisher("mc"), ValueError, r"'exact', 'monte_carlo', 'empirical'"),
        (lambda: Fisher("monte_carlo", samples=0), ValueError, r"at least one"),
        (lambda: get_metric("hessian"), ValueError, r"'hessian' is unknown.*'gauss_newton', 'new"),
        (lambda: get_metric(abs), TypeError, r"Divergence\(fn\)"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- what every metric promises


def test_lookup():
    assert metric_names() == (
        "gauss_newton",
        "newton",
        "fisher",
        "fisher_mc",
        "empirical_fisher",
        "kl",
        "reverse_kl",
        "renyi",
        "squared_error",
    )
    assert all(isinstance(get_metric(name), Metric) for name in metric_names())
    assert get_metric("renyi") == Renyi(0.5)
    assert get_metric("fisher_mc") == Fisher("monte_carlo", samples=1, seed=0)
    assert get_metric("empirical_fisher") == Fisher("empirical")
    own = Renyi(2.0)
    assert get_metric(own) is own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("name", metric_names())
def test_dtype_and_no_graph(name, dtype):
    for loss, x, y, *_ in NAMED.values():
        leaf = x.to(dtype).requires_grad_()
        model = get_metric(name).cost_model(loss, leaf, y)
        assert model.terminal.dtype == dtype
        assert not any(part.requires_grad for part in model.terminal.representation())
        v = torch.ones(x.numel(), dtype=dtype)
        out = model.terminal @ v
        assert out.dtype == dtype and bool(out.isfinite().all()) and not out.requires_grad
        assert bool((model.terminal.to_dense().double().diagonal() >= 0).all())
        if model.costate is not None:
            assert model.costate.dtype == dtype and not model.costate.requires_grad


def test_divergence_in_low_precision():
    x = normal(4, 3).bfloat16()
    metric = Divergence(lambda a, b: (a.softmax(-1) - b.softmax(-1)).square().sum(-1).mean())
    q = metric.terminal(MeanSquaredError(), x, x)
    wide = metric.terminal(MeanSquaredError(), x.float(), x).to_dense()
    assert q.dtype == torch.bfloat16
    torch.testing.assert_close(q.to_dense().float(), wide, rtol=2**-7, atol=1e-8)
