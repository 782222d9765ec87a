"""Every operator of a problem against its own dense matrix, and the dense matrices of a chain."""

from functools import cache

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from llqr_mf.operators import MatrixFreeOperator, SubmatrixOperator, ZeroOperator
from llqr_mf.solvers.cg import cg
from scipy.sparse.linalg import cg as scipy_cg
from scipy.sparse.linalg import eigsh
from small_models import F64, mlp, network, normal
from torch import nn

import llqr_mf as lq

INPUTS, TARGETS = normal(3, 3, seed=1), torch.tensor([0, 1, 1])


def problem_of(metric, *, dtype=F64, columns=None, damping=1.0):
    model = mlp(3, 4, 2, dtype=dtype)
    return lq.LQRProblem.from_network(
        lq.split(model),
        *(INPUTS.to(dtype), TARGETS),
        loss="cross_entropy",
        metric=metric,
        damping=damping,
        columns=columns,
    )


def operators_of(problem):
    """Layers 0 (linear) and 1 (tanh); layer 1 has no parameters."""
    return {
        **{f"{name}[0]": getattr(problem, name)[0] for name in "ABQRS"},
        **{f"{name}[1]": getattr(problem, name)[1] for name in "ABQRS"},
        "Q[T]": problem.Q[-1],
        "hessian": problem.hessian,
        "output_jacobian": problem.output_jacobian,
        "value": problem.value(1),
        "gain": problem.gain(0),
        "empty gain": problem.gain(1),
    }


OPERATORS = {
    **{f"newton {k}": v for k, v in operators_of(problem_of("newton")).items()},
    **{f"gauss-newton {k}": v for k, v in operators_of(problem_of("gauss_newton")).items()},
}
_H, _J = OPERATORS["newton hessian"], OPERATORS["newton output_jacobian"]
OPERATORS |= {
    "transposed A": OPERATORS["newton A[0]"].mT,
    "transposed gain": OPERATORS["newton gain"].mT,
    "submatrix": _H[2:9, 1:6],
    "submatrix of a submatrix": _H[2:, 1:][:8, ::2],
    "submatrix with repeats": _J[:, [3, 0, 3, 5]],
    "zero": ZeroOperator(INPUTS.new_empty(0), sizes=(5, 4)),
}
DIAGONAL = DiagLinearOperator(1 + normal(26, seed=9).abs())
COMPOSED = {
    "sum": _H + OPERATORS["gauss-newton hessian"],
    "difference": _H - OPERATORS["gauss-newton hessian"],
    "sum with a diagonal": _H + DIAGONAL,
    "multiple": 3.0 * _H,
    "product": _J @ _H,
    "triple product": _J @ _H @ _J.mT,
}
ALL = {**OPERATORS, **COMPOSED}


def names_of(operators, least=0):
    return [name for name, operator in operators.items() if min(operator.shape) >= least]


every = pytest.mark.parametrize("name", ALL)
ours = pytest.mark.parametrize("name", OPERATORS)
not_empty = pytest.mark.parametrize("name", names_of(OPERATORS, 1))
indexable = pytest.mark.parametrize("name", names_of(OPERATORS, 4))


@cache
def dense_of(name):
    """By single columns; `to_dense` takes the rows of wide operators instead."""
    operator = ALL[name]
    columns = [operator @ unit for unit in torch.eye(operator.shape[1], dtype=F64)]
    if not columns:
        return torch.zeros(operator.shape, dtype=F64)
    return torch.stack(columns, 1)


def close(a, b):
    """The value and gain are solves to 1e-12; anything else is a few products."""
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- products


@every
def test_products(name):
    operator, dense = ALL[name], dense_of(name)
    m, n = dense.shape
    assert tuple(operator.shape) == (m, n) and operator.dtype == F64
    for shape in ((n,), (n, 1), (n, 3), (2, n, 3), (2, 3, n, 2), (n, 0)):
        rhs = normal(*shape, seed=2)
        close(operator @ rhs, dense @ rhs)
        close(operator.matmul(rhs), dense @ rhs)
    for shape in ((m,), (m, 3), (2, m, 3)):
        lhs = normal(*shape, seed=3)
        close(operator.mT @ lhs, dense.mT @ lhs)
    close(normal(2, m, seed=4) @ operator, normal(2, m, seed=4) @ dense)
    close(operator.mT.mT @ torch.ones(n, dtype=F64), dense.sum(1))
    assert tuple(operator.mT.shape) == (n, m)


@every
def test_written_out(name):
    operator, dense = ALL[name], dense_of(name)
    close(operator.to_dense(), dense)
    close(operator.mT.to_dense(), dense.mT)
    if dense.shape[0] == dense.shape[1]:
        close(operator.diagonal(), dense.diagonal())


@every
def test_algebra(name):
    operator, dense = ALL[name], dense_of(name)
    close((operator + operator).to_dense(), 2 * dense)
    close((operator - 3.0 * operator).to_dense(), -2 * dense)
    close((operator * 0.5).to_dense(), dense / 2)
    close((operator / 2).to_dense(), dense / 2)
    close((operator @ operator.mT).to_dense(), dense @ dense.mT)
    close((operator + dense).to_dense(), 2 * dense)


@ours
def test_minus(name):
    close((-ALL[name]).to_dense(), -dense_of(name))


INDICES = [
    (slice(2, 5), slice(1, 4)),
    (slice(None, None, 2), slice(1, None, 2)),
    (3,),
    (-1,),
    (slice(None), 1),
    (slice(None), -2),
    (2, 1),
    (-2, -1),
    ([0, 2], [1, 1]),
    ([0, 2, 2],),
    (slice(None), [1, 3, 1]),
    (..., 1),
    (..., slice(1, 2)),
]


@indexable
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing(name, index):
    operator, dense = ALL[name], dense_of(name)
    part = operator[index]
    part = part if isinstance(part, torch.Tensor) else part.to_dense()
    expected = dense[index]
    assert part.shape == expected.shape
    close(part, expected)


def test_masks_and_indices_out_of_range():
    dense = dense_of("newton hessian")
    mask = torch.arange(len(dense)) % 3 == 0
    close(_H[mask].to_dense(), dense[mask])
    for index in (26, -27, (0, 26)):
        with pytest.raises(IndexError, match=r"out of range for an axis of size 26"):
            _H[index]


def test_a_submatrix_multiplies_repeated_columns_by_their_sum():
    dense = dense_of("newton hessian")
    part = _H[[1, 1, 4]][:, [2, 2]]
    close(part @ torch.tensor([1.0, 10.0], dtype=F64), 11 * dense[[1, 1, 4], 2])
    close(part.mT @ torch.tensor([1.0, 10.0, 100.0], dtype=F64), _repeated(dense))
    assert isinstance(part, SubmatrixOperator)


def _repeated(dense):
    return (11 * dense[1, 2] + 100 * dense[4, 2]).expand(2)


# ---- derivatives and transforms


@not_empty
@pytest.mark.parametrize("through", ["@", "_matmul"])
def test_torch_func(name, through):
    operator, dense = ALL[name], dense_of(name)
    m, n = dense.shape

    def product(v):
        return operator @ v if through == "@" else operator._matmul(v)

    v, w, V = normal(n, seed=2), normal(m, seed=3), normal(4, n, seed=4)
    close(torch.func.vmap(product)(V), V @ dense.mT)
    close(torch.func.vmap(torch.func.vmap(product))(V.reshape(2, 2, n)).flatten(0, 1), V @ dense.mT)
    value, tangent = torch.func.jvp(product, (v,), (V[0],))
    close(value, dense @ v)
    close(tangent, dense @ V[0])
    close(torch.func.vjp(product, v)[1](w)[0], dense.mT @ w)
    close(torch.func.grad(lambda x: product(x).square().sum())(v), 2 * dense.mT @ (dense @ v))
    close(torch.func.jacrev(product)(v), dense)
    close(torch.func.jacfwd(product)(v), dense)
    square = torch.func.hessian(lambda x: product(x).square().sum())(v)
    close(square, 2 * dense.mT @ dense)


@pytest.mark.parametrize("name", COMPOSED)
def test_torch_func_of_composed_operators(name):
    """`@` of linear_operator's own classes is a legacy autograd.Function; `_matmul` is not."""
    operator, dense = ALL[name], dense_of(name)
    V = normal(4, dense.shape[1], 1, seed=4)
    close(torch.func.vmap(operator._matmul)(V), dense @ V)
    close(torch.func.jvp(operator._matmul, (V[0],), (V[1],))[1], dense @ V[1])


@pytest.mark.parametrize("name", names_of(ALL, 1))
def test_autograd_in_the_right_hand_side(name):
    operator, dense = ALL[name], dense_of(name)
    for shape in ((dense.shape[1],), (dense.shape[1], 3)):
        rhs = normal(*shape, seed=2).requires_grad_()
        weights = normal(dense.shape[0], *shape[1:], seed=3)
        # An exact zero depends on nothing, and the sum needs something to go back to.
        ((operator @ rhs) * weights).sum().add(0 * rhs.sum()).backward()
        close(rhs.grad, dense.mT @ weights)


# ---- passes


def test_products_in_passes_equal_those_at_once():
    chunked = operators_of(problem_of("newton", columns=2))
    for name, operator in chunked.items():
        whole = OPERATORS[f"newton {name}"]
        V, W = normal(2, operator.shape[1], 5), normal(operator.shape[0], 3)
        close(operator @ V, whole @ V)
        close(operator.mT @ W, whole.mT @ W)
        close(operator.to_dense(), whole.to_dense())
        if operator.shape[0] == operator.shape[1]:
            close(operator.diagonal(), whole.diagonal())


class _Counting(MatrixFreeOperator):
    """A dense matrix that remembers how many columns it was given at a time."""

    def __init__(self, proto, *, matrix, seen, columns=None):
        super().__init__(proto, columns=columns, matrix=matrix, seen=seen)
        self.matrix, self.seen = matrix, seen

    def _sizes(self):
        return tuple(self.matrix.shape)

    def _rows(self, v):
        self.seen.append(len(v))
        return v @ self.matrix.mT

    def _rows_t(self, w):
        self.seen.append(len(w))
        return w @ self.matrix


@pytest.mark.parametrize(
    "use",
    [
        lambda a: a @ normal(2, 9, 5),
        lambda a: a.mT @ normal(9, 5),
        lambda a: a.to_dense(),
        lambda a: a.mT.to_dense(),
        lambda a: a.diagonal(),
        lambda a: a[1:5, 2:] @ normal(7, 5),
        lambda a: a[torch.arange(5), torch.arange(5)],
        lambda a: a.to_scipy() @ normal(9, 5).numpy(),
        lambda a: (a + a) @ normal(9, 5),
        lambda a: (a @ a.mT) @ normal(9, 5),
        lambda a: cg(a, normal(9, 5), max_iterations=2),
    ],
)
def test_no_pass_takes_more_columns_than_it_was_told(use):
    seen = []
    matrix = torch.eye(9, dtype=F64) + 0.1 * torch.ones(9, 9, dtype=F64)
    use(_Counting(matrix.new_empty(0), matrix=matrix, seen=seen, columns=2))
    assert seen and max(seen) <= 2


def test_every_operator_of_a_problem_keeps_its_columns():
    for name, operator in operators_of(problem_of("newton", columns=2)).items():
        if not isinstance(operator, ZeroOperator) and name not in ("Q[T]", "R[1]"):
            assert operator._columns == 2, name


# ---- other libraries


@not_empty
def test_scipy_products(name):
    operator, dense = ALL[name], dense_of(name)
    m, n = dense.shape
    scipy, numpy = operator.to_scipy(), dense.numpy()
    assert scipy.shape == (m, n) and scipy.dtype == numpy.dtype
    for given, expected in (
        (scipy.matvec(normal(n).numpy()), numpy @ normal(n).numpy()),
        (scipy.matvec(normal(n, 1).numpy()), numpy @ normal(n, 1).numpy()),
        (scipy.rmatvec(normal(m).numpy()), numpy.T @ normal(m).numpy()),
        (scipy.matmat(normal(n, 3).numpy()), numpy @ normal(n, 3).numpy()),
        (scipy.rmatmat(normal(m, 3).numpy()), numpy.T @ normal(m, 3).numpy()),
        ((scipy.T @ scipy).matvec(normal(n).numpy()), numpy.T @ (numpy @ normal(n).numpy())),
    ):
        assert given.shape == expected.shape
        close(torch.from_numpy(given), torch.from_numpy(expected))


def test_scipy_solvers_run_on_the_hessian():
    problem = problem_of("gauss_newton", damping=0.1)
    step, code = scipy_cg(problem.hessian.to_scipy(), -problem.gradient.numpy(), rtol=1e-11)
    assert code == 0
    dense = problem.hessian.to_dense()
    close(torch.from_numpy(step), torch.linalg.solve(dense, -problem.gradient))
    largest = eigsh(problem.hessian.to_scipy(), k=2, return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(dense)[-2:]
    close(torch.from_numpy(largest).sort().values, expected)


# ---- dtypes


@pytest.mark.parametrize("metric", ["newton", "gauss_newton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(metric, dtype):
    """To a few roundings: the weights are those of float64, rounded, so the matrices differ too."""
    exact = operators_of(problem_of(metric))
    for name, operator in operators_of(problem_of(metric, dtype=dtype)).items():
        if "gain" in name or name == "value":
            continue  # solves: tests/test_equivalence.py
        m, n = operator.shape
        assert operator.dtype == dtype
        dense = exact[name].to_dense()
        for rhs in (normal(n, dtype=dtype), normal(n, 2, dtype=dtype)):
            product = operator @ rhs
            assert product.dtype == dtype
            scale = (dense.abs() @ rhs.double().abs()).max() if dense.numel() else 1.0
            error = (product.double() - dense @ rhs.double()).abs().amax() if m else 0.0
            assert error <= 20 * torch.finfo(dtype).eps * scale, name
        if n and m and dtype != torch.bfloat16:
            assert operator.to_scipy().matvec(normal(n).numpy()).dtype == "float32"


# ---- what does not fit


@ours
def test_what_does_not_fit_says_so(name):
    operator = ALL[name]
    n = operator.shape[1]
    for rhs in (normal(n + 1), normal(n + 1, 2), normal(2, n + 1, 2)):
        with pytest.raises(ValueError, match="cannot multiply a tensor of shape"):
            operator @ rhs
    with pytest.raises(ValueError, match=r"float64 on cpu .*float32 on cpu: convert"):
        operator @ normal(n, dtype=torch.float32)
    with pytest.raises(ValueError, match="meta: convert"):
        operator @ torch.zeros(n, dtype=F64, device="meta")
    with pytest.raises(NotImplementedError, match="multiply a batch of right-hand sides instead"):
        operator.unsqueeze(0)


def test_an_operator_without_a_transpose_says_so():
    class OneWay(_Counting):
        _rows_t = MatrixFreeOperator._rows_t

    operator = OneWay(normal(0), matrix=normal(3, 3), seen=[])
    with pytest.raises(NotImplementedError, match="OneWay has no transposed product"):
        operator.mT @ normal(3)


# ---- states of size zero


@pytest.mark.parametrize("metric", ["newton", "gauss_newton"])
def test_integer_inputs_make_an_empty_first_state(metric):
    model, tokens, targets = network("tied")
    problem = lq.LQRProblem.from_network(
        *(lq.split(model), tokens, targets), loss="cross_entropy", metric=metric, damping=10.0
    )
    n, m = problem.A[1].shape[1], problem.B[0].shape[1]
    assert tuple(problem.A[0].shape) == (n, 0) and tuple(problem.S[0].shape) == (m, 0)
    empty = torch.zeros(0, dtype=F64)
    for operator in (problem.A[0], problem.S[0], problem.gain(0)):
        close(operator @ empty, torch.zeros(operator.shape[0], dtype=F64))
        close(operator @ empty.reshape(0, 2), torch.zeros(operator.shape[0], 2, dtype=F64))
        assert (operator.mT @ normal(operator.shape[0])).shape == (0,)
        assert tuple(operator.to_dense().shape) == tuple(operator.shape)
    for operator in (problem.Q[0], problem.value(0)):
        assert (operator @ empty).shape == (0,)
        assert operator.diagonal().shape == (0,) and operator.to_dense().shape == (0, 0)
    assert problem.x0.shape == problem.q[0].shape == (0,)


# ---- against dense derivatives of known layers


def chain():
    """Layers as functions of (parameters, state), with different kinds of coupling."""
    model = mlp(3, 4, 2, activation=nn.Sigmoid)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    functions = [
        (lambda w, x: torch.nn.functional.linear(x, w["0.weight"], w["0.bias"]), weights_of("0")),
        (lambda w, x: torch.sigmoid(x), ()),
        (lambda w, x: torch.nn.functional.linear(x, w["2.weight"], w["2.bias"]), weights_of("2")),
    ]
    return model, weights, functions


def weights_of(layer):
    return (f"{layer}.weight", f"{layer}.bias")


def test_a_chain_of_known_layers_has_their_derivatives():
    """A_t, B_t and the second derivatives of <p_{t+1}, f_t>, each by autograd on f_t alone."""
    model, weights, functions = chain()
    problem = lq.LQRProblem.from_network(
        lq.split(model), INPUTS, TARGETS, loss="cross_entropy", metric="newton", damping=0.5
    )
    states = [INPUTS]
    for f, _ in functions:
        states.append(f(weights, states[-1]))

    def loss(y):
        return torch.nn.functional.cross_entropy(y, TARGETS)

    costate = torch.func.grad(loss)(states[-1]).flatten()
    for t in reversed(range(3)):
        f, names = functions[t]
        x, theta = states[t].flatten(), [weights[name].flatten() for name in names]
        theta = torch.cat([normal(0), *theta])

        def layer(x, theta, t=t, f=f, names=names):
            parts = theta.split([weights[n].numel() for n in names]) if names else ()
            given = {n: v.reshape(weights[n].shape) for n, v in zip(names, parts, strict=True)}
            return f(given, x.reshape(states[t].shape)).flatten()

        def weighted(x, theta, layer=layer, p=costate):
            return p @ layer(x, theta)

        A, B = torch.func.jacrev(layer, argnums=(0, 1))(x, theta)
        (Q, _), (S, R) = torch.func.hessian(weighted, argnums=(0, 1))(x, theta)
        close(problem.A[t].to_dense(), A)
        close(problem.B[t].to_dense(), B)
        close(problem.Q[t].to_dense(), Q)
        close(problem.S[t].to_dense(), S)
        close(problem.R[t].to_dense(), R + 0.5 * torch.eye(len(R), dtype=F64))
        costate = A.mT @ costate
    close(problem.Q[3].to_dense(), torch.func.hessian(loss)(states[3]).reshape(6, 6))
    assert problem.S[0].to_dense().abs().max() > 1e-3  # bilinear in weight and input
    assert problem.Q[1].to_dense().abs().max() > 1e-3  # the sigmoid bends
