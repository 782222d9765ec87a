"""`split` and the stages of every network of the zoo, against dense derivatives."""

import copy

import pytest
import torch
from networks import ZOO, as_tuple
from oracle import (
    dense_hessian_columns,
    dense_jacobian,
    finite_difference_hessian,
    finite_difference_jacobian,
    forward,
)
from split_cases import FIRST, SECOND, every_network, normal, size
from systems import system_of

import llqr_mf as lq


@every_network
def test_layers_hold_every_parameter_once(name):
    model, inputs, _, _ = ZOO[name]()
    layers = lq.split(model)
    held = [n for layer in layers for n in layer.parameters]
    expected = {n for n, p in model.named_parameters() if p.requires_grad and n != "never"}
    assert len(held) == len(set(held))
    assert set(held) == expected
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        for n, p in layer.parameters.items():
            assert model.get_parameter(n) is p
    system, linearization = system_of(model, inputs, layers=layers)
    owned = [i for ids in system.owned for i in ids]
    assert sorted(owned) == list(range(len(linearization.parameters)))


@every_network
def test_jacobian_products(name):
    """J u by the rollout, J' c by the adjoint, one and several columns; outputs of the model."""
    model, inputs, _, _ = ZOO[name]()
    dense = dense_jacobian(model, inputs)
    system, linearization = system_of(model, inputs)
    output = forward(model, inputs)[0]
    torch.testing.assert_close(linearization.outputs, output.detach(), **FIRST)
    u, c = normal(3, size(model)), normal(3, *output.shape)
    rows = c.reshape(3, -1)
    torch.testing.assert_close(system.output_product(u), u @ dense.mT, **FIRST)
    torch.testing.assert_close(system.output_product_t((c,), 3), rows @ dense, **FIRST)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(system.output_product(u[one]), u[one] @ dense.mT, **FIRST)
        torch.testing.assert_close(
            system.output_product_t((c[one],), 1), rows[one] @ dense, **FIRST
        )
    # Without buffers, as under torch.func, the control parts come back instead.
    _, product = system.adjoint((c,), out=None, columns=3)
    torch.testing.assert_close(product, rows @ dense, **FIRST)


@every_network
def test_oracle_is_right(name):
    """The dense Jacobian and the autograd Hessian against finite differences."""
    model, inputs, _, _ = ZOO[name]()
    u, p = normal(size(model), 1), normal(forward(model, inputs)[0].numel())
    if name == "embedding":
        u[:3] = 0  # the padding row: read by the forward pass, left alone by autograd
    found = dense_jacobian(model, inputs) @ u
    expected = finite_difference_jacobian(model, inputs, u)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def loss(y):
        return y.reshape(-1) @ p

    found = dense_hessian_columns(model, inputs, loss, u)
    expected = finite_difference_hessian(model, inputs, loss, u)
    if name == "embedding":
        found[:3] = expected[:3] = 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_network
def test_second_order_products(name):
    """The Hessian of <p, network> against reverse over reverse; symmetric."""
    model, inputs, _, _ = ZOO[name]()
    output = forward(model, inputs)[0]
    p, u = normal(*output.shape, seed=2), normal(3, size(model))
    system, _ = system_of(model, inputs, costate=p)
    expected = dense_hessian_columns(model, inputs, lambda y: (y * p).sum(), u.mT)
    product = system.condensed_product(u)
    torch.testing.assert_close(product.mT, expected, **SECOND)
    for i in range(3):
        alone = system.condensed_product(u[i : i + 1])
        torch.testing.assert_close(alone, product[i : i + 1], **SECOND)
    form = u @ product.mT
    scale = float(u.norm() * product.norm())
    assert float((form - form.mT).abs().max()) <= 1e-12 * scale


@every_network
def test_stages_are_adjoint_and_symmetric(name):
    """Stage by stage, carried states and tied weights included, with random states."""
    model, inputs, _, _ = ZOO[name]()
    p = normal(*forward(model, inputs)[0].shape)
    plain, _ = system_of(model, inputs)
    curved, _ = system_of(model, inputs, costate=p)

    def draw(shapes, seed):
        return tuple(normal(2, *shape, seed=seed + i) for i, shape in enumerate(shapes))

    def inner(a, b):
        pairs = zip(a, b, strict=True)
        return sum((x * y).sum() for x, y in pairs if x is not None and y is not None)

    for stage, bent in zip(plain.stages, curved.stages, strict=True):
        x, u = draw(stage.state, 0), draw(stage.controls, 10)
        c = draw(stage.next_state, 20)
        moved, record = stage.forward(x, u)
        px, pu = stage.backward(c, record)
        left, right = inner(c, moved), inner(px, x) + inner(pu, u)
        torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), **SECOND)
        if not bent.curved:
            continue
        y, v = draw(stage.state, 30), draw(stage.controls, 40)
        none = tuple(None for _ in stage.next_state)
        first = bent.backward(none, bent.forward(x, u)[1])
        second = bent.backward(none, bent.forward(y, v)[1])
        left = inner(first[0], y) + inner(first[1], v)
        right = inner(second[0], x) + inner(second[1], u)
        torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), **SECOND)


@every_network
@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_the_model_is_left_as_it_was(name, metric):
    """State, gradients, flags, random state, hooks, attributes and the next outputs."""
    model, inputs, targets, loss = ZOO[name]()
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    twin = copy.deepcopy(model)
    given = copy.deepcopy(as_tuple(inputs))
    before = _everything(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()

    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=1.0
    )
    problem.hessian @ problem.gradient

    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()
    after = _everything(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert _same(value, after[key]), key
    assert all(p.grad is None for p in parameters[1:])
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    for x, y in zip(as_tuple(inputs), given, strict=True):
        assert torch.equal(x, y)
    torch.manual_seed(3)
    expected = twin(*as_tuple(inputs))
    torch.manual_seed(3)
    assert torch.equal(model(*copy.deepcopy(given)), expected)


def _everything(model):
    """All that a module tree holds, by path; containers are copied, tensors cloned."""
    seen = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            if attribute != "_modules":
                seen[path, attribute] = _frozen_copy(value)
    return seen


def _frozen_copy(value):
    if isinstance(value, torch.Tensor):
        return (id(value), value._version, value.requires_grad, value.detach().clone())
    if isinstance(value, dict):
        return {key: _frozen_copy(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_frozen_copy(v) for v in value]
    return value


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


def test_zoo_is_small():
    assert sum(size(ZOO[name]()[0]) for name in ZOO) < 600 * len(ZOO)
