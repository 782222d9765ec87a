"""Every solver, on every kind of network and metric, against one dense solve.

The dense matrices come from `small_models.Oracle`: derivatives of the whole model, one backward
pass per row, and Hessians of losses and divergences in the outputs alone.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from linear_operator.operators import DiagLinearOperator, KroneckerProductLinearOperator
from small_models import (
    F64,
    NETWORKS,
    Oracle,
    dense_step,
    mlp,
    network,
    normal,
    output_hessian,
    relative,
    seeded,
)
from torch import nn

import llqr_mf as lq
from llqr_mf.gram import closed_form_gram
from llqr_mf.losses import BCEWithLogits, CrossEntropy, MeanSquaredError
from llqr_mf.metrics import Divergence, Fisher, Newton, Renyi, StateCosts
from llqr_mf.output_sweep import terminal_factor

TOLERANCE = 1e-8
DIRECT, ITERATIVE = ("riccati", "dual", "low_rank"), ("cg", "minres", "auto")


def cross_entropy(targets):
    return lambda y: F.cross_entropy(y.flatten(0, -2), targets.flatten())


def lopsided(y, reference):
    """A divergence whose gradient does not vanish where its arguments coincide."""
    return (0.7 * y.tanh() + (y - 0.5 * reference).square()).flatten(1).sum(1).mean()


def kl(p, q):
    """Mean over all distributions, which are on the last axis."""
    return (p * (p.log() - q.log())).sum(-1).mean()


class Dense:
    """Dense gradient and curvatures of a network of the zoo."""

    def __init__(self, name):
        self.model, self.inputs, self.targets = network(name)
        self.oracle = Oracle(self.model, self.inputs)
        self.outputs = self.oracle.outputs
        self.loss = cross_entropy(self.targets)
        self.J, self.gradient = self.oracle.jacobian(), self.oracle.gradient(self.loss)
        self.count = self.targets.numel()

    def curvature(self, metric):
        """Of a metric of that name; without damping."""
        if metric == "newton":
            return self.oracle.hessian(self.loss)
        if metric == "lopsided":
            return self.oracle.hessian(lambda y: lopsided(y, self.outputs))
        Q = self._outer(metric)
        if Q is None:
            Q = output_hessian(self._divergence(metric), self.outputs)
        return self.J.mT @ Q @ self.J

    def _divergence(self, metric):
        now = self.outputs.softmax(-1)
        return {
            "gauss_newton": self.loss,
            "fisher": lambda y: kl(now, y.softmax(-1)),
            "kl": lambda y: kl(now, y.softmax(-1)),
            "reverse_kl": lambda y: kl(y.softmax(-1), now),
            "renyi": lambda y: -2 * (now * y.softmax(-1)).sqrt().sum(-1).log().mean(),
            "renyi(2)": lambda y: (now**2 / y.softmax(-1)).sum(-1).log().mean(),
            "squared_error": lambda y: (y - self.outputs).square().sum() / 2 / len(y),
        }[metric]

    def _outer(self, metric):
        """Sums of outer products of one gradient per sample."""
        if metric == "empirical_fisher":
            vectors = torch.func.grad(self.loss)(self.outputs) * self.count
        elif metric == "fisher_mc":
            generator = torch.Generator().manual_seed(3)
            vectors = CrossEntropy().sample_gradients(self.outputs, self.targets, 1, generator)
        else:
            return None
        rows = vectors.reshape(len(self.outputs), -1)
        return torch.block_diag(*(torch.outer(v, v) for v in rows)) / self.count


METRICS = {
    **{name: name for name in ("gauss_newton", "newton", "fisher", "kl", "reverse_kl", "renyi")},
    **{name: name for name in ("squared_error", "empirical_fisher")},
    "fisher_mc": Fisher("monte_carlo", seed=3),
    "renyi(2)": Renyi(2.0),
    "lopsided": Divergence(lopsided),
}
SECOND_ORDER = ("newton", "lopsided")


@cache
def dense(name):
    return Dense(name)


@cache
def curvature(name, metric):
    return dense(name).curvature(metric)


def damping_for(H):
    """Enough to make an indefinite Hessian as definite as 0.05 makes the others."""
    return 0.05 + max(0.0, -2 * float(torch.linalg.eigvalsh(H)[0]))


def build(name, metric, damping=0.05, **kwargs):
    model, inputs, targets = network(name)
    return lq.LQRProblem.from_network(
        *(lq.split(model), inputs, targets),
        **{"loss": "cross_entropy", "metric": METRICS.get(metric, metric), "damping": damping},
        **kwargs,
    )


def solutions(problem, methods, rtol=1e-12):
    """CG reaches 1e-12 in a few more iterations than exact arithmetic would take."""
    for method in methods:
        limit = {} if method in DIRECT else {"max_iterations": 1000}
        yield method, lq.solve(problem, method, rtol=rtol, **limit)


networks = pytest.mark.parametrize("name", NETWORKS)


# ---- the oracle itself


@networks
def test_the_oracle_by_finite_differences(name):
    """Central differences of step h leave h^2 |f'''| / 6 and eps / h, each below 1e-7 of f'."""
    d, h = dense(name), 1e-4
    v = normal(len(d.gradient), seed=9)
    v /= v.norm()
    ahead, behind = (d.oracle.at(s * h * v, lambda o: o._run().detach()) for s in (1, -1))
    assert relative((ahead - behind).flatten() / (2 * h), d.J @ v) < 1e-6
    assert abs(float((d.loss(ahead) - d.loss(behind)) / (2 * h) - d.gradient @ v)) < 1e-6
    functions = {"newton": d.loss, "lopsided": lambda y: lopsided(y, d.outputs)}
    for metric, function in functions.items():

        def gradient(oracle, function=function):
            return oracle.gradient(function)

        ahead, behind = (d.oracle.at(s * h * v, gradient) for s in (1, -1))
        assert relative((ahead - behind) / (2 * h), curvature(name, metric) @ v) < 1e-6


# ---- the equivalence


@networks
@pytest.mark.parametrize("metric", METRICS)
def test_every_method_is_the_dense_solve(name, metric):
    d, H = dense(name), curvature(name, metric)
    damping = damping_for(H)
    problem = build(name, metric, damping)
    H = H + damping * torch.eye(len(H), dtype=F64)
    assert relative(problem.gradient, d.gradient) < 1e-12
    assert relative(problem.hessian.to_dense(), H) < 1e-12
    expected = dense_step(H, d.gradient)
    direct = DIRECT[:1] if metric in SECOND_ORDER else DIRECT
    for method, solution in solutions(problem, (*direct, *ITERATIVE)):
        assert solution.status.ok, str(solution.status)
        assert solution.step.shape == expected.shape and solution.step.dtype == F64
        assert relative(solution.step, expected) < TOLERANCE, method
        assert solution.residual_norm < 1e-11, method
        decrease = -(d.gradient @ expected + expected @ H @ expected / 2)
        torch.testing.assert_close(solution.model_decrease, decrease, rtol=TOLERANCE, atol=0)


@networks
def test_jacobian_and_objective(name):
    d, problem = dense(name), build(name, "newton", 0.3)
    assert relative(problem.output_jacobian.to_dense(), d.J) < 1e-12
    assert relative(problem.output_jacobian.mT.to_dense(), d.J.mT) < 1e-12
    H = curvature(name, "newton") + 0.3 * torch.eye(len(d.gradient), dtype=F64)
    u = normal(len(H), 3, seed=4)
    expected = d.gradient @ u + (u * (H @ u)).sum(0) / 2
    torch.testing.assert_close(problem.objective(u), expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(problem.objective(u[:, 0]), expected[0], rtol=1e-11, atol=0)
    assert problem.objective(0 * u[:, 0]) == 0 and problem.constant == 0
    torch.testing.assert_close(problem.origin.loss_value, d.loss(d.outputs), rtol=1e-14, atol=0)
    torch.testing.assert_close(problem.origin.outputs, d.outputs, rtol=1e-12, atol=1e-13)


@networks
def test_second_derivatives_of_layers_are_symmetric(name):
    """Q_t and R_t, and S_t against its own transposed product."""
    problem = build(name, "newton", 0.0)
    largest = dict.fromkeys("QRS", 0.0)
    for key in largest:
        for operator in getattr(problem, key):
            matrix, other = operator.to_dense(), operator.mT.to_dense().mT
            columns = operator @ torch.eye(operator.shape[1], dtype=F64)
            scale = float(matrix.abs().max()) if matrix.numel() else 0.0
            largest[key] = max(largest[key], scale)
            same = (other, columns) if key == "S" else (other, columns, columns.mT)
            for candidate in same:
                torch.testing.assert_close(matrix, candidate, rtol=0, atol=1e-12 * max(1, scale))
    assert largest["Q"] > 1e-3 and largest["S"] > 1e-3
    # R_t is not zero where a parameter is multiplied by another within one layer, which is what
    # attention's in_proj does if it is one call; otherwise layers are linear in their parameters.


@pytest.mark.parametrize("metric", ["gauss_newton", "newton", "lopsided"])
@pytest.mark.parametrize("name", ["mlp", "conv_train", "resnet_eval", "pre_norm", "tied"])
def test_values_and_gains(name, metric):
    """Lazy, transposed and by low rank, against the dense recursion's matrices."""
    problem = build(name, metric, damping_for(curvature(name, metric)))
    solved = lq.solve(problem, "riccati")
    for t in {0, 1, problem.horizon // 2, problem.horizon - 1}:
        P, K = solved.values[t].to_dense(), solved.gains[t].to_dense()
        pairs = [(problem.value(t), P), (problem.gain(t), K), (problem.gain(t).mT, K.mT)]
        if metric == "gauss_newton":
            swept = lq.solve(problem, "low_rank")
            pairs += [(swept.values[t], P), (swept.gains[t], K), (swept.gains[t].mT, K.mT)]
        for operator, matrix in pairs:
            scale = float(matrix.abs().max()) if matrix.numel() else 1.0
            v = normal(operator.shape[1], 4, seed=t)
            torch.testing.assert_close(
                operator @ v, matrix @ v, rtol=TOLERANCE, atol=TOLERANCE * max(scale, 1e-3)
            )


# ---- costs on layers in between


@pytest.mark.parametrize("base", ["gauss_newton", "newton"])
def test_costs_on_the_states_of_an_mlp(base):
    model, inputs, targets = network("mlp")
    layers = lq.split(model)
    n, eye, root = 4, torch.eye(20, dtype=F64), normal(20, 20, seed=3)
    Q2 = root @ root.mT / 100
    costs = {0: 0.3, layers[2].name: Q2, 3: DiagLinearOperator(torch.full((20,), 0.02, dtype=F64))}
    metric = StateCosts(costs, base=Newton()) if base == "newton" else StateCosts(costs)
    H = curvature("mlp", base).clone()
    for end, Q in ((1, 0.3 / n * eye), (3, Q2), (4, 0.02 * eye)):
        # The outputs of layer t are those of the first t + 1 modules.
        part = Oracle(model[:end], inputs).jacobian()
        H[: part.shape[1], : part.shape[1]] += part.mT @ Q @ part
    damping = damping_for(H)
    problem = lq.LQRProblem.from_network(
        layers, inputs, targets, loss="cross_entropy", metric=metric, damping=damping
    )
    H = H + damping * torch.eye(len(H), dtype=F64)
    assert relative(problem.hessian.to_dense(), H) < 1e-12
    methods = ("riccati", *ITERATIVE) if base == "newton" else ("riccati", "low_rank", *ITERATIVE)
    for method, solution in solutions(problem, methods):
        assert relative(solution.step, dense_step(H, problem.gradient)) < TOLERANCE, method
    with pytest.raises(ValueError, match="needs a terminal cost alone"):
        lq.solve(problem, "dual")
    # Adding a cost on the last layer's own output is the same as more terminal cost.
    at_end = lq.LQRProblem.from_network(
        layers, inputs, targets, loss="cross_entropy", metric=StateCosts({4: 0.5}), damping=0.05
    )
    J = dense("mlp").J
    H = curvature("mlp", "gauss_newton") + 0.5 / n * J.mT @ J + 0.05 * torch.eye(J.shape[1])
    for method, solution in solutions(at_end, ("riccati", "low_rank", *ITERATIVE)):
        assert relative(solution.step, dense_step(H, at_end.gradient)) < TOLERANCE, method


def test_a_cost_in_a_residual_network_is_on_what_the_layer_made():
    """Not on the skip that is carried past it."""
    model, inputs, targets = network("resnet_eval")
    layers = lq.split(model)
    name = "block1.conv1"
    problem = lq.LQRProblem.from_network(
        *(layers, inputs, targets), loss="cross_entropy", metric=StateCosts({name: 0.4}), damping=0
    )
    kept = []
    oracle = Oracle(model, inputs)
    oracle.model.get_submodule(name).register_forward_hook(lambda *call: kept.append(call[-1]))
    oracle._run()
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    entry, oracle.parameters, retain_graph=True, materialize_grads=True
                )
            ]
        )
        for entry in kept[0].flatten()
    ]
    J = torch.stack(rows)
    H = curvature("resnet_eval", "gauss_newton") + 0.4 / len(inputs) * J.mT @ J
    assert relative(problem.hessian.to_dense(), H) < 1e-12


# ---- the dual's Gram matrix


@pytest.mark.parametrize("metric", ["gauss_newton", "fisher", "fisher_mc"])
@networks
def test_closed_form_gram(name, metric):
    """L'J R^{-1} J'L with another damping on every layer, or None where samples interact.

    The dual corrects a wrong Gram matrix by more iterations, so only this would see one.
    """
    layers = lq.split(network(name)[0])
    problem = build(name, metric, [0.1 * (t + 1) for t in range(len(layers))])
    gram = closed_form_gram(problem)
    if name in ("conv_train", "resnet_train", "tied"):
        assert gram is None
        return
    factor, J = terminal_factor(problem), dense(name).J
    size = factor.rank * factor.samples
    L = factor.factor(torch.eye(size, dtype=F64).reshape(size, factor.rank, factor.samples)).mT
    where, scale = zip(*blocks_of(problem, layers), strict=True)
    order = torch.cat([torch.arange(J.shape[1])[s] for s in where])
    inverse = torch.cat(
        [
            torch.full((s.stop - s.start,), 1 / d, dtype=F64)
            for s, d in zip(where, scale, strict=True)
        ]
    )
    JL = J[:, order].mT @ L
    expected = JL.mT @ (inverse.unsqueeze(1) * JL)
    assert relative(gram, expected) < 1e-12
    solution = lq.solve(problem, "dual", rtol=1e-10)
    assert solution.iterations <= 2 and "closed form" in solution.status.message


def blocks_of(problem, layers):
    """(slice of the flat step, damping) of every parameter, layer after layer."""
    where, offset = {}, 0
    for name, part in problem.unflatten(problem.gradient).items():
        where[name] = slice(offset, offset + part.numel())
        offset += part.numel()
    return [
        (where[name], 0.1 * (t + 1)) for t, layer in enumerate(layers) for name in layer.parameters
    ]


# ---- the flat layout


@networks
def test_flat_order_is_that_of_named_parameters(name):
    model, *_ = network(name)
    problem, d = build(name, "gauss_newton"), dense(name)
    assert list(problem.names) == [n for n, _ in model.named_parameters()]
    parts = problem.unflatten(problem.gradient)
    loss = d.loss(d.oracle._run())
    for (_, p), (key, part) in zip(d.oracle.model.named_parameters(), parts.items(), strict=True):
        expected = torch.autograd.grad(loss, p, retain_graph=True)[0]
        torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-13)
        assert part.shape == model.get_parameter(key).shape
        assert part.data_ptr() >= problem.gradient.data_ptr()  # a view
    shuffled = dict(reversed(parts.items()))
    assert torch.equal(problem.flatten(shuffled), problem.gradient)
    with pytest.raises(ValueError, match=r"a flat step has shape \(\d+,\), not \(3,\)"):
        problem.unflatten(torch.zeros(3))
    first = next(iter(parts))
    with pytest.raises(ValueError, match=f"the part '{first}' is missing"):
        problem.flatten({k: v for k, v in parts.items() if k != first})


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
@pytest.mark.parametrize(
    "name, frozen",
    [
        ("mlp", ["0.weight", "2.bias"]),
        ("conv_train", ["conv1.weight", "norm1.bias"]),
        ("post_norm", ["embed.weight", "embed.bias", "encoder.self_attn.in_proj_weight"]),
        ("tied", ["attention.out_proj.weight"]),
    ],
)
def test_frozen_parameters_are_left_out(name, frozen, metric):
    model, inputs, targets = network(name)
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    oracle = Oracle(model, inputs)
    loss = cross_entropy(targets)
    H = oracle.hessian(loss)
    if metric == "gauss_newton":
        J = oracle.jacobian()
        H = J.mT @ output_hessian(loss, oracle.outputs) @ J
    damping = damping_for(H)
    problem = lq.LQRProblem.from_network(
        *(lq.split(model), inputs, targets), loss="cross_entropy", metric=metric, damping=damping
    )
    assert not set(frozen) & set(problem.names)
    expected = dense_step(H + damping * torch.eye(len(H), dtype=F64), oracle.gradient(loss))
    methods = ("riccati", *ITERATIVE) if metric == "newton" else (*DIRECT, *ITERATIVE)
    for method, solution in solutions(problem, methods):
        assert relative(solution.step, expected) < TOLERANCE, method


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x, z):
        return self.head(torch.tanh(self.left(x)) * self.right(z))


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_two_inputs(metric):
    model, inputs = seeded(TwoInputs), (normal(4, 3), normal(4, 2, seed=1))
    targets = torch.tensor([0, 2, 1, 1])
    oracle, loss = Oracle(model, inputs), cross_entropy(targets)
    H = oracle.hessian(loss)
    if metric == "gauss_newton":
        J = oracle.jacobian()
        H = J.mT @ output_hessian(loss, oracle.outputs) @ J
    damping = damping_for(H)
    problem = lq.LQRProblem.from_network(
        *(lq.split(model), inputs, targets), loss="cross_entropy", metric=metric, damping=damping
    )
    expected = dense_step(H + damping * torch.eye(len(H), dtype=F64), oracle.gradient(loss))
    for method, solution in solutions(problem, ("riccati", *ITERATIVE)):
        assert relative(solution.step, expected) < TOLERANCE, method


# ---- scaling: everything is a mean


@networks
@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"fisher_mc"}))
def test_a_batch_given_twice_makes_the_same_step(name, metric):
    """Damping, loss, curvature and state costs are means: none of them grows with the batch."""
    model, inputs, targets = network(name)
    damping = damping_for(curvature(name, metric))
    steps = []
    for x, y in ((inputs, targets), (torch.cat([inputs] * 2), torch.cat([targets] * 2))):
        problem = lq.LQRProblem.from_network(
            lq.split(model), x, y, loss="cross_entropy", metric=METRICS[metric], damping=damping
        )
        steps.append(lq.solve(problem, "cg", rtol=1e-12, max_iterations=1000).step)
    assert relative(steps[1], steps[0]) < TOLERANCE


def test_state_costs_are_means_too():
    model, inputs, targets = network("mlp")
    hessians = []
    for x, y in ((inputs, targets), (torch.cat([inputs] * 2), torch.cat([targets] * 2))):
        problem = lq.LQRProblem.from_network(
            lq.split(model), x, y, loss="cross_entropy", metric=StateCosts({1: 0.3}), damping=0.0
        )
        hessians.append(problem.hessian.to_dense())
    assert relative(hessians[1], hessians[0]) < 1e-12


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_a_loss_times_three(metric):
    _, _, targets = network("mlp")
    loss = cross_entropy(targets)
    hessians, gradients = [], []
    for scale in (1.0, 3.0):
        problem = build_with("mlp", lambda y, t, s=scale: s * loss(y), metric, 0.0)
        hessians.append(problem.hessian.to_dense())
        gradients.append(problem.gradient)
        assert float(problem.origin.loss_value) == pytest.approx(
            scale * float(loss(dense("mlp").outputs)), rel=1e-14
        )
    assert relative(hessians[1], 3 * hessians[0]) < 1e-12
    assert relative(gradients[1], 3 * gradients[0]) < 1e-12


def build_with(name, loss, metric, damping, targets=None):
    model, inputs, labels = network(name)
    return lq.LQRProblem.from_network(
        *(lq.split(model), inputs, labels if targets is None else targets),
        **{"loss": loss, "metric": metric, "damping": damping},
    )


# ---- losses


def floats(name):
    return torch.rand(dense(name).outputs.shape, dtype=F64)


CLASS_WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
IGNORED = torch.tensor([0, 2, -100, 1])
WEIGHT5 = torch.tensor([1.0, 2.0, 0.5, 1.5, 0.7], dtype=F64)
TOKENS = torch.tensor([[1, -1, 2], [0, 0, -1], [3, 4, 4], [2, -1, -1]])
LOSSES = {
    "smoothing": (
        *("mlp", CrossEntropy(label_smoothing=0.2), torch.tensor([0, 2, 1, 1])),
        lambda y, t: F.cross_entropy(y, t, label_smoothing=0.2),
    ),
    "weights": (
        *("mlp", nn.CrossEntropyLoss(weight=CLASS_WEIGHT), torch.tensor([0, 2, 1, 1])),
        lambda y, t: F.cross_entropy(y, t, weight=CLASS_WEIGHT),
    ),
    "ignored": ("mlp", "cross_entropy", IGNORED, F.cross_entropy),
    "probabilities": (
        *("mlp", "cross_entropy", normal(4, 3, seed=8).softmax(-1)),
        F.cross_entropy,
    ),
    "sequence": (
        *("tied", CrossEntropy(ignore_index=-1, weight=WEIGHT5, label_smoothing=0.1), TOKENS),
        lambda y, t: F.cross_entropy(y.mT, t, ignore_index=-1, weight=WEIGHT5, label_smoothing=0.1),
    ),
    "mse": ("mlp", "mse", normal(4, 3, seed=8), F.mse_loss),
    "mse of sequences": ("tied", MeanSquaredError(), normal(4, 3, 5, seed=8), F.mse_loss),
    "bce": (
        *("mlp", "bce_with_logits", (normal(4, 3, seed=8) > 0).to(F64)),
        F.binary_cross_entropy_with_logits,
    ),
    "weighted bce": (
        *("mlp", BCEWithLogits(pos_weight=CLASS_WEIGHT), (normal(4, 3, seed=8) > 0).to(F64)),
        lambda y, t: F.binary_cross_entropy_with_logits(y, t, pos_weight=CLASS_WEIGHT),
    ),
    "callable": (
        *("mlp", lambda y, t: (y - t).cosh().log().mean(), normal(4, 3, seed=8)),
        lambda y, t: (y - t).cosh().log().mean(),
    ),
    "callable of sequences": (
        *("tied", lambda y, t: (y - t).pow(4).mean(), normal(4, 3, 5, seed=8)),
        lambda y, t: (y - t).pow(4).mean(),
    ),
}


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
@pytest.mark.parametrize("which", LOSSES)
def test_losses(which, metric):
    name, loss, targets, function = LOSSES[which]
    d = dense(name)

    def of_outputs(y):
        return function(y, targets)

    if metric == "newton":
        H = d.oracle.hessian(of_outputs)
    else:
        H = d.J.mT @ output_hessian(of_outputs, d.outputs) @ d.J
    damping = damping_for(H)
    problem = build_with(name, loss, metric, damping, targets)
    g = d.oracle.gradient(of_outputs)
    assert relative(problem.gradient, g) < 1e-11
    expected = dense_step(H + damping * torch.eye(len(H), dtype=F64), g)
    methods = ("riccati", *ITERATIVE) if metric == "newton" else (*DIRECT, *ITERATIVE)
    for method, solution in solutions(problem, methods):
        assert relative(solution.step, expected) < TOLERANCE, method


# ---- damping


def positions(problem, layer):
    """Where a layer's parameters are in the flat step, in the flat order."""
    offset, found = 0, []
    for name, part in problem.unflatten(problem.gradient).items():
        if name in layer.parameters:
            found.append(torch.arange(offset, offset + part.numel()))
        offset += part.numel()
    return torch.cat(found) if found else torch.arange(0)


def spd(n, seed):
    root = normal(n, n, seed=seed)
    return root @ root.mT / max(n, 1) + 0.1 * torch.eye(n, dtype=F64)


def dampings(problem, layers):
    """(what a user writes, dense R, whether R_t exists) for every kind of damping."""
    P, where = problem.size, [positions(problem, layer) for layer in layers]
    per_layer = [0.1 + 0.05 * t for t in range(len(layers))]
    R = torch.zeros(P, P, dtype=F64)
    for value, place in zip(per_layer, where, strict=True):
        R[place, place] = value
    yield "sequence", per_layer, R, True
    names = {la.name: v for la, v in zip(layers, per_layer, strict=True) if la.parameters}
    yield "mapping", names, R, True
    yield "0-d tensors", [torch.tensor(v) for v in per_layer], R.float().double(), True
    given, R = [], torch.zeros(P, P, dtype=F64)
    for t, place in enumerate(where):
        n = len(place)
        kind = t % 3
        if kind == 0 and n % 2 == 0 and n:
            left, right = spd(2, t), spd(n // 2, t + 50)
            operator = KroneckerProductLinearOperator(left, right)
            block = torch.kron(left, right)
        elif kind == 1 or n > 20:
            operator = DiagLinearOperator(0.1 + normal(n, seed=t).abs())
            block = torch.diag(operator.diagonal())
        else:
            operator = block = spd(n, t)
        given.append(operator if n else 0.0)
        R[place.unsqueeze(1), place] = block
    yield "operators", given, R, True
    whole = spd(P, 77)
    yield "one matrix", whole, whole, False
    diagonal = 0.1 + normal(P, seed=5).abs()
    yield "one diagonal", DiagLinearOperator(diagonal), torch.diag(diagonal), True
    yield "tensor number", torch.tensor(0.25), 0.25 * torch.eye(P, dtype=F64), True


@pytest.mark.parametrize("name", ["mlp", "pre_norm", "tied", "conv_eval"])
def test_damping_of_every_kind(name):
    """In the pre-norm Transformer the layers' order is not that of the flat step."""
    d = dense(name)
    model, inputs, targets = network(name)
    layers = lq.split(model)
    undamped = build(name, "gauss_newton", 0.0)
    for kind, damping, R, by_layer in dampings(undamped, layers):
        problem = lq.LQRProblem.from_network(
            layers, inputs, targets, loss="cross_entropy", damping=damping
        )
        H = curvature(name, "gauss_newton") + R
        assert relative(problem.hessian.to_dense(), H) < 1e-12, kind
        methods = (*DIRECT, *ITERATIVE) if by_layer else ("dual", *ITERATIVE)
        for method, solution in solutions(problem, methods):
            error = relative(solution.step, dense_step(H, d.gradient))
            assert error < TOLERANCE, (kind, method)
        if by_layer:
            for t, layer in enumerate(layers):
                place = positions(problem, layer)
                block = R[place.unsqueeze(1), place]
                torch.testing.assert_close(problem.R[t].to_dense(), block, rtol=1e-12, atol=1e-13)
                torch.testing.assert_close(problem.R[t].diagonal(), block.diagonal())
        else:
            for call in (lambda p: p.R, lambda p: p.gain(1), lambda p: lq.solve(p, "riccati")):
                with pytest.raises(ValueError, match="one operator per layer, or solve with"):
                    call(problem)
        shared = undamped.with_damping(damping)
        assert relative(shared.hessian.to_dense(), H) < 1e-12, kind
        assert torch.equal(shared.gradient, problem.gradient)


def test_the_inverse_of_an_operator_is_made_once(monkeypatch):
    model, inputs, targets = network("mlp")
    layers = lq.split(model)
    made = []
    from llqr_mf.operators import control_cost

    original = control_cost.inverse_operator
    monkeypatch.setattr(control_cost, "inverse_operator", lambda R: made.append(R) or original(R))
    undamped = build("mlp", "gauss_newton", 0.0)
    damping = [spd(len(positions(undamped, layer)), 3) for layer in layers]
    problem = lq.LQRProblem.from_network(
        layers, inputs, targets, loss="cross_entropy", damping=damping
    )
    lq.solve(problem, "dual")
    assert len(made) == sum(bool(layer.parameters) for layer in layers)


def test_inputs_may_need_gradients_and_stay_as_they_are():
    model, inputs, targets = network("mlp")
    asking = inputs.clone().requires_grad_()
    problem = lq.LQRProblem.from_network(lq.split(model), asking, targets, loss="cross_entropy")
    assert not problem.gradient.requires_grad and asking.grad is None
    assert not lq.solve(problem).step.requires_grad


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_a_list_of_functions_is_a_network(metric):
    """The same net as modules and as functions of their parameters."""
    model, inputs, targets = network("mlp")
    weights = dict(model.named_parameters())
    functions = [
        (lambda p, x: F.linear(x, p["weight"], p["bias"]), _pair(weights, "0")),
        torch.tanh,
        (lambda p, x: F.linear(x, p["weight"], p["bias"]), _pair(weights, "2")),
        torch.tanh,
        (lambda p, x: F.linear(x, p["weight"], p["bias"]), _pair(weights, "4")),
    ]
    problem = lq.LQRProblem.from_network(
        *(lq.split(functions), inputs, targets), loss="cross_entropy", metric=metric, damping=2.0
    )
    H = curvature("mlp", metric) + 2 * torch.eye(problem.size, dtype=F64)
    for method, solution in solutions(problem, ("riccati", *ITERATIVE)):
        assert relative(solution.step, dense_step(H, dense("mlp").gradient)) < TOLERANCE, method


def _pair(weights, layer):
    return {"weight": weights[f"{layer}.weight"], "bias": weights[f"{layer}.bias"]}


def test_activations_without_second_derivative_leave_the_bilinear_terms():
    """A ReLU net's Newton has S_t but no Q_t of its own before the output."""
    model = mlp(4, 5, 3, activation=nn.ReLU)
    inputs, targets = normal(4, 4, seed=1), torch.tensor([0, 2, 1, 1])
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss="cross_entropy", metric="newton", damping=0.0
    )
    assert (
        relative(problem.hessian.to_dense(), Oracle(model, inputs).hessian(cross_entropy(targets)))
        < 1e-12
    )
    assert all(not bool(Q.to_dense().any()) for Q in problem.Q[:-1])
    assert problem.S[2].to_dense().abs().max() > 1e-3


class Idle(nn.Module):
    """The first, a middle and the last parameter are read by nothing."""

    def __init__(self):
        super().__init__()
        self.before = nn.Parameter(torch.ones(2, 3))
        self.first = nn.Linear(4, 5)
        self.between = nn.Linear(2, 2)
        self.last = nn.Linear(5, 3)
        self.after = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_parameters_that_nothing_reads_do_not_move(metric):
    model, inputs, targets = seeded(Idle), normal(4, 4), torch.tensor([0, 2, 1, 1])
    problem = lq.LQRProblem.from_network(
        *(lq.split(model), inputs, targets), loss="cross_entropy", metric=metric, damping=2.0
    )
    assert list(problem.names) == [name for name, _ in model.named_parameters()]
    methods = ("riccati", *ITERATIVE) if metric == "newton" else (*DIRECT, *ITERATIVE)
    for method, solution in solutions(problem, methods):
        H = problem.hessian.to_dense()
        assert relative(solution.step, dense_step(H, problem.gradient)) < TOLERANCE, method
        parts = problem.unflatten(solution.step)
        for name, part in parts.items():
            idle = name.startswith(("before", "between", "after"))
            assert bool((part == 0).all()) == idle, (method, name)
