"""Linear-quadratic problems from given matrices, against dense KKT systems."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.operators import (
    BlockDiagLinearOperator,
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    IdentityLinearOperator,
    KroneckerProductLinearOperator,
    LowRankRootLinearOperator,
    ToeplitzLinearOperator,
)
from llqr_mf.solvers.riccati import riccati
from llqr_mf.solvers.status import Code
from small_models import F64, normal, relative

import llqr_mf as lq

TOLERANCE = 1e-8


class Matrices:
    """A random problem with dense matrices; `given` are the arguments of `LQRProblem`.

    The joint stage cost [[Q, S'], [S, R]] is positive definite with R >= I unless told otherwise,
    so the Hessian's condition number stays below about a thousand.
    """

    def __init__(self, n, m, *, seed=0, terminal_only=False, cross=True):
        self.n, self.m, self.T = n, m, len(m)
        draw = iter(range(seed * 1000, (seed + 1) * 1000))

        def randn(*shape):
            return normal(*shape, seed=next(draw))

        def scaled(rows, columns):
            return randn(rows, columns) / max(rows, columns, 1) ** 0.5

        self.A = [scaled(n[t + 1], n[t]) for t in range(self.T)]
        self.B = [scaled(n[t + 1], m[t]) for t in range(self.T)]
        self.Q, self.S, self.R = [], [], []
        for t in range(self.T + 1):
            size = n[t] + (m[t] if t < self.T else 0)
            root = scaled(size, size)
            joint = root @ root.mT
            quiet = terminal_only and t < self.T
            self.Q.append(torch.zeros(n[t], n[t], dtype=F64) if quiet else joint[: n[t], : n[t]])
            if t < self.T:
                S = joint[n[t] :, : n[t]]
                self.S.append(S if cross and not quiet else torch.zeros_like(S))
                self.R.append(joint[n[t] :, n[t] :] + torch.eye(m[t], dtype=F64))
        self.q = [randn(size) for size in n]
        self.r = [randn(size) for size in m]
        self.f = [randn(size) for size in n[1:]]
        self.x0 = randn(n[0])

    @property
    def given(self):
        names = ("A", "B", "Q", "R", "S", "q", "r", "f", "x0")
        return {name: getattr(self, name) for name in names}

    def problem(self, **changed):
        return lq.LQRProblem(**(self.given | changed))

    def terminal_problem(self):
        """Without the costs that the dual cannot take."""
        nothing = [None] * self.T
        return self.problem(Q=[*nothing, self.Q[-1]], S=nothing)

    def kkt(self, start=0, *, linear=True, x0=None, r=None):
        """Minimises over states and controls from time `start` on, one big dense solve.

        Returns the controls and states as lists, and the objective.
        """
        A, B, Q, S, R = (part[start:] for part in (self.A, self.B, self.Q, self.S, self.R))
        n, m, T = self.n[start:], self.m[start:], self.T - start
        zeros = torch.zeros_like
        q, f = ([v if linear else zeros(v) for v in p[start:]] for p in (self.q, self.f))
        r = [v if linear else zeros(v) for v in self.r[start:]] if r is None else r
        x0 = self.x0 if x0 is None else x0
        size, rows = sum(n) + sum(m), sum(n)
        H, C = torch.zeros(size, size, dtype=F64), torch.zeros(rows, size, dtype=F64)
        h, c = torch.zeros(size, dtype=F64), torch.zeros(rows, dtype=F64)
        at = [sum(n[:t]) for t in range(T + 2)]
        mt = [sum(n) + sum(m[:t]) for t in range(T + 1)]
        X = [slice(at[t], at[t + 1]) for t in range(T + 1)]
        U = [slice(mt[t], mt[t + 1]) for t in range(T)]
        C[X[0], X[0]], c[X[0]] = torch.eye(n[0], dtype=F64), x0
        for t in range(T + 1):
            H[X[t], X[t]], h[X[t]] = Q[t], q[t]
            if t < T:
                H[U[t], U[t]], H[U[t], X[t]], H[X[t], U[t]] = R[t], S[t], S[t].mT
                h[U[t]] = r[t]
                C[X[t + 1], X[t + 1]] = torch.eye(n[t + 1], dtype=F64)
                C[X[t + 1], X[t]], C[X[t + 1], U[t]], c[X[t + 1]] = -A[t], -B[t], f[t]
        zero = torch.zeros(rows, rows, dtype=F64)
        whole = torch.cat([torch.cat([H, C.mT], 1), torch.cat([C, zero], 1)])
        z = torch.linalg.solve(whole, torch.cat([-h, c]))[:size]
        return [z[u] for u in U], [z[x] for x in X], z @ H @ z / 2 + h @ z


SHAPES = {
    "one stage": ([3, 2], [4]),
    "growing": ([1, 3, 5, 2], [2, 1, 3]),
    "more controls than states": ([2, 2, 2], [5, 6]),
    "a stage without controls": ([3, 4, 2, 3], [2, 0, 1]),
    "an empty first state": ([0, 3, 2], [2, 2]),
    "an empty state in between": ([2, 0, 3], [2, 2]),
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def matrices(shape, **kwargs):
    return Matrices(*SHAPES[shape], **kwargs)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


# ---- the optimum by every method


@shapes
@pytest.mark.parametrize("method", ["auto", "riccati", "cg", "minres"])
def test_every_cost_at_once(shape, method):
    given = matrices(shape)
    problem = given.problem()
    controls, _, objective = given.kkt()
    solution = lq.solve(problem, method, rtol=1e-12)
    assert solution.status.code is Code.CONVERGED, str(solution.status)
    close(solution.step, torch.cat(controls))
    close(problem.objective(solution.step), objective)
    close(solution.model_decrease, problem.constant - objective)
    assert solution.residual_norm <= 1e-11


@shapes
@pytest.mark.parametrize("method", ["auto", "riccati", "cg", "minres", "dual", "low_rank"])
def test_terminal_cost_alone(shape, method):
    given = matrices(shape, terminal_only=True)
    controls, _, objective = given.kkt()
    problem = given.terminal_problem()
    solution = lq.solve(problem, method, rtol=1e-12)
    assert solution.status.ok, str(solution.status)
    close(solution.step, torch.cat(controls))
    close(problem.objective(solution.step), objective)


@shapes
def test_low_rank_takes_state_costs(shape):
    given = matrices(shape, cross=False)
    solution = lq.solve(given.problem(S=None), "low_rank", rtol=1e-12)
    close(solution.step, torch.cat(given.kkt()[0]))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5),
    last=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_sizes_of_every_kind(sizes, last, seed):
    n, m = [n for n, _ in sizes] + [last], [m for _, m in sizes]
    drawn = Matrices(n, m, seed=seed)
    problem, expected = drawn.problem(), torch.cat(drawn.kkt()[0])
    close(lq.solve(problem, "riccati").step, expected)
    # Rounding may cost CG more iterations than there are controls, its default limit.
    close(lq.solve(problem, "cg", rtol=1e-12, max_iterations=100).step, expected)
    drawn = Matrices(n, m, seed=seed, terminal_only=True)
    problem, expected = drawn.terminal_problem(), torch.cat(drawn.kkt()[0])
    for method in ("dual", "low_rank"):
        close(lq.solve(problem, method, rtol=1e-12).step, expected)


def test_matches_mpc_pytorch():
    mpc = pytest.importorskip("mpc.mpc")
    T, n, m = 4, 3, 2
    given = Matrices([n] * (T + 1), [m] * T)
    # Its last stage has a control too, which costs something and moves nothing.
    C = torch.zeros(T + 1, 1, n + m, n + m, dtype=F64)
    c = torch.zeros(T + 1, 1, n + m, dtype=F64)
    for t in range(T + 1):
        C[t, 0, :n, :n], c[t, 0, :n] = given.Q[t], given.q[t]
        C[t, 0, n:, n:] = given.R[t] if t < T else torch.eye(m, dtype=F64)
        if t < T:
            C[t, 0, n:, :n], C[t, 0, :n, n:], c[t, 0, n:] = given.S[t], given.S[t].mT, given.r[t]
    F = torch.stack([torch.cat([a, b], 1) for a, b in zip(given.A, given.B, strict=True)])
    solver = mpc.MPC(n, m, T + 1, lqr_iter=2, verbose=-1, backprop=False, exit_unconverged=False)
    _, controls, objective = solver(
        given.x0.unsqueeze(0),
        mpc.QuadCost(C, c),
        mpc.LinDx(F.unsqueeze(1), torch.stack(given.f).unsqueeze(1)),
    )
    problem = given.problem()
    solution = lq.solve(problem, "cg", rtol=1e-12)
    close(solution.step, controls[:T, 0].flatten())
    close(problem.objective(solution.step), objective[0])


# ---- objective, gradient, Hessian


def rolled_out(given, u):
    """The objective of a flat control, by its definition."""
    x, total, offset = given.x0, torch.zeros((), dtype=F64), 0
    for t in range(given.T):
        v = u[offset : offset + given.m[t]]
        offset += given.m[t]
        total = total + x @ given.Q[t] @ x / 2 + v @ given.S[t] @ x + v @ given.R[t] @ v / 2
        total = total + given.q[t] @ x + given.r[t] @ v
        x = given.A[t] @ x + given.B[t] @ v + given.f[t]
    return total + x @ given.Q[-1] @ x / 2 + given.q[-1] @ x


@shapes
def test_objective_gradient_and_hessian(shape):
    given = matrices(shape)
    problem = given.problem()
    u, columns = normal(sum(given.m), seed=7), normal(sum(given.m), 3, seed=8)
    zero = torch.zeros_like(u)
    close(problem.constant, rolled_out(given, zero))
    close(problem.objective(u), rolled_out(given, u))
    each = torch.stack([rolled_out(given, column) for column in columns.mT])
    close(problem.objective(columns), each)
    close(problem.gradient, torch.func.grad(lambda v: rolled_out(given, v))(zero))
    close(problem.hessian.to_dense(), torch.func.hessian(lambda v: rolled_out(given, v))(zero))


@shapes
def test_the_problem_gives_back_what_it_was_given(shape):
    given = matrices(shape)
    problem = given.problem()
    for name in ("A", "B", "Q", "R", "S"):
        for operator, matrix in zip(getattr(problem, name), getattr(given, name), strict=True):
            close(operator.to_dense(), matrix)
            close(operator @ normal(matrix.shape[1]), matrix @ normal(matrix.shape[1]))
    for name in ("q", "r", "f"):
        for mine, theirs in zip(getattr(problem, name), getattr(given, name), strict=True):
            close(mine, theirs)
    close(problem.x0, given.x0)
    assert problem.horizon == given.T and problem.size == sum(given.m)
    parts = problem.unflatten(torch.arange(problem.size, dtype=F64))
    assert list(parts) == [f"u{t}" for t in range(given.T)]
    assert [part.numel() for part in parts.values()] == given.m
    close(problem.flatten(parts), torch.arange(problem.size, dtype=F64))


def test_what_is_left_out_is_zero():
    given = Matrices([2, 3, 2], [2, 1], terminal_only=True)
    short = lq.LQRProblem(A=given.A, B=given.B, Q=[None, None, given.Q[-1]], R=[2.0, 1])
    full = lq.LQRProblem(
        **{"A": given.A, "B": given.B, "S": given.S},
        Q=given.Q,
        R=[2 * torch.eye(2, dtype=F64), torch.eye(1, dtype=F64)],
        **{"q": [0 * q for q in given.q], "r": [0 * r for r in given.r]},
        **{"f": [0 * f for f in given.f], "x0": 0 * given.x0},
    )
    u = normal(3)
    close(short.objective(u), full.objective(u))
    close(short.gradient, full.gradient)
    assert bool((short.gradient == 0).all()) and short.constant == 0
    assert lq.solve(short, rhs=u).status.ok
    bare = lq.LQRProblem(A=given.A, B=given.B)
    assert bool((bare.hessian.to_dense() == 0).all())
    started = lq.LQRProblem(A=given.A, B=given.B, x0=given.x0)
    assert started.constant == 0 and started.objective(u) == 0


# ---- values and gains


@shapes
def test_values_and_gains(shape):
    """P_t and K_t of the tail problem by KKT; lazy, by Riccati, and transposed."""
    given = matrices(shape)
    problem = given.problem()
    solution = lq.solve(problem, "riccati")
    close(problem.value(given.T).to_dense(), given.Q[-1])
    for t in range(given.T):
        P, K = [], []
        for unit in torch.eye(given.n[t], dtype=F64):
            controls, states, _ = given.kkt(t, linear=False, x0=unit)
            K.append(controls[0])
            # The gradient of the least cost in x_t: the costate there.
            p = given.Q[-1] @ states[-1]
            for s in range(given.T - 1, t - 1, -1):
                x, u = states[s - t], controls[s - t]
                p = given.A[s].mT @ p + given.Q[s] @ x + given.S[s].mT @ u
            P.append(p)
        P = torch.stack(P, 1) if P else torch.zeros(0, 0, dtype=F64)
        K = torch.stack(K, 1) if K else torch.zeros(given.m[t], 0, dtype=F64)
        for value, gain in (
            (problem.value(t), problem.gain(t)),
            (solution.values[t], solution.gains[t]),
        ):
            close(value.to_dense(), P)
            close(gain.to_dense(), K)
            close(gain.mT.to_dense(), K.mT)
            close(value @ normal(given.n[t], 2), P @ normal(given.n[t], 2))
            close(gain.mT @ normal(given.m[t], 2), K.mT @ normal(given.m[t], 2))


@shapes
def test_values_and_gains_by_low_rank(shape):
    given = matrices(shape, cross=False)
    problem = given.problem(S=None)
    dense, sweep = lq.solve(problem, "riccati"), lq.solve(problem, "low_rank", rtol=1e-12)
    for ours, theirs in ((sweep.values, dense.values), (sweep.gains, dense.gains)):
        for operator, matrix in zip(ours, theirs, strict=True):
            close(operator.to_dense(), matrix.to_dense())
            close(operator.mT.to_dense(), matrix.to_dense().mT)


def test_the_closed_loop_with_offsets_is_the_optimum():
    given = Matrices([3, 2, 4], [2, 3])
    result = riccati(
        *(given.A, given.B, given.Q, given.R, given.S, given.q, given.r, given.f, given.x0)
    )
    controls, states, objective = given.kkt()
    x = given.x0
    for t in range(2):
        u = result.gains[t] @ x + result.offsets[t]
        close(u, controls[t])
        close(result.states[t], states[t])
        x = given.A[t] @ x + given.B[t] @ u + given.f[t]
    # p_0 is the slope of the least cost in x_0.
    nudge = 1e-5 * normal(3, seed=5)
    ahead, behind = (given.kkt(x0=given.x0 + s * nudge)[2] for s in (1, -1))
    slope = result.values[0] @ given.x0 + result.value_slopes[0]
    torch.testing.assert_close((ahead - behind) / 2, slope @ nudge, rtol=1e-8, atol=0)
    assert objective < rolled_out(given, torch.cat(controls) + 1e-3)


def test_times_out_of_range():
    problem = Matrices([2, 2], [1]).problem()
    for t in (-1, 2):
        with pytest.raises(ValueError, match=rf"time {t} is outside of 0\.\.1"):
            problem.value(t)
    for t in (-1, 1):
        with pytest.raises(ValueError, match=rf"time {t} is outside of 0\.\.0"):
            problem.gain(t)


def test_values_of_badly_conditioned_tails_are_reached():
    """Rounding costs CG several times as many iterations as there are controls."""
    given = Matrices([6, 6, 6], [8, 8])
    given.R = [torch.diag(torch.logspace(-6, 0, 8, dtype=F64)) for _ in range(2)]
    given.S = [0 * S for S in given.S]
    problem = given.problem()
    expected = lq.solve(problem, "riccati").values[0].to_dense()
    assert relative(problem.value(0).to_dense(), expected) < 1e-6


def test_a_value_that_is_not_reached_warns():
    given = Matrices([6, 6, 6], [6, 6])
    with pytest.warns(RuntimeWarning, match="relative residual"):
        given.problem().value(0, max_iterations=1) @ given.x0
    rough = given.problem().value(0, rtol=1e-2).to_dense()
    exact = lq.solve(given.problem(), "riccati").values[0].to_dense()
    assert 1e-8 < relative(rough, exact) < 1e-1


# ---- several right-hand sides


@pytest.mark.parametrize("method", ["riccati", "cg", "minres", "dual", "low_rank"])
def test_right_hand_sides(method):
    """H u = b: every linear term of the problem is left out."""
    given = Matrices([3, 4, 2], [2, 3], terminal_only=True)
    problem = given.terminal_problem()
    b = normal(5, 3, seed=4)
    b[:, 1] = 0
    expected = torch.linalg.solve(problem.hessian.to_dense(), b)
    solution = lq.solve(problem, method, rhs=b, rtol=1e-12)
    close(solution.step, expected)
    assert solution.step.shape == (5, 3) and bool((solution.step[:, 1] == 0).all())
    close(solution.model_decrease, (b * expected).sum(0) / 2)
    close(lq.solve(problem, method, rhs=b[:, 0], rtol=1e-12).step, expected[:, 0])
    split = [-part for part in b[:, 0].split(given.m)]
    close(expected[:, 0], torch.cat(given.kkt(linear=False, x0=0 * given.x0, r=split)[0]))


# ---- problems that are not convex


def indefinite():
    given = Matrices([2, 2, 2], [2, 2])
    given.R[1] = -3 * torch.eye(2, dtype=F64)
    return given


def test_riccati_says_where_the_problem_is_indefinite():
    given = indefinite()
    problem = given.problem()
    solution = lq.solve(problem, "riccati")
    assert solution.status.code is Code.INDEFINITE and not solution.status.ok
    assert "at stage 1" in solution.status.message and "damping" in solution.status.message
    # The step is still the stationary point, which minres finds too.
    close(solution.step, torch.linalg.solve(problem.hessian.to_dense(), -problem.gradient))
    close(lq.solve(problem, "minres", rtol=1e-12, max_iterations=50).step, solution.step)


def test_other_methods_on_an_indefinite_problem():
    problem = indefinite().problem()
    assert lq.solve(problem, "cg").status.code is Code.NEGATIVE_CURVATURE
    auto = lq.solve(problem)
    assert auto.method == "riccati" and auto.status.code is Code.INDEFINITE
    with pytest.raises(ValueError, match="tail problem has no solution: negative curvature"):
        problem.value(1).to_dense()
    given = Matrices([2, 2, 2], [2, 2], terminal_only=True)
    given.Q[-1] = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
    for method in ("dual", "low_rank"):
        with pytest.raises(ValueError, match=r"Q\[2\] is indefinite .*use method='cg'"):
            lq.solve(given.terminal_problem(), method)


def test_a_singular_problem_is_not_called_solved():
    given = Matrices([2, 2], [3])
    given.R = [torch.zeros(3, 3, dtype=F64)]
    given.S = [torch.zeros(3, 2, dtype=F64)]
    assert lq.solve(given.problem(), "riccati").status.code is Code.INDEFINITE


def test_an_indefinite_stage_in_a_convex_problem_is_reported():
    given = Matrices([2, 2, 2], [2, 2])
    given.Q[1] = given.Q[1] - 0.2 * torch.eye(2, dtype=F64) - given.S[1].mT @ given.S[1]
    problem = given.problem()
    assert torch.linalg.eigvalsh(problem.hessian.to_dense())[0] > 0
    assert torch.linalg.eigvalsh(given.Q[1])[0] < 0
    solution = lq.solve(problem, "riccati")
    assert solution.status.ok
    assert "indefinite at stages [1]" in solution.status.message
    assert "convex all the same" in solution.status.message
    close(solution.step, torch.cat(given.kkt()[0]))
    assert "indefinite" not in lq.solve(Matrices([2, 2], [2]).problem(), "riccati").status.message


@pytest.mark.parametrize("method", ["dual", "low_rank"])
@pytest.mark.parametrize("R", [[0.0, 1.0], [-1.0, 1.0], [None, 1.0], ["singular", 1.0]])
def test_methods_that_need_the_inverse_of_the_control_cost(method, R):
    given = Matrices([2, 2, 2], [2, 2], terminal_only=True)
    given.R = [torch.diag(torch.tensor([1.0, 0.0], dtype=F64)) if r == "singular" else r for r in R]
    with pytest.raises(ValueError, match="method='cg'"):
        lq.solve(given.terminal_problem(), method)


# ---- linear operators


def operators():
    """A problem whose parts are operators of many kinds, and the same one with matrices."""
    given = Matrices([4, 4, 6, 4], [4, 6, 4], terminal_only=True)
    root, vector = normal(4, 2, seed=3), normal(4, seed=4)
    factors = [normal(k, k, seed=k) for k in (2, 3)]
    definite = [f @ f.mT + torch.eye(len(f), dtype=F64) for f in factors]
    blocks = torch.stack([torch.eye(2, dtype=F64) + 0.5, 2 * torch.eye(2, dtype=F64)])
    dense = DenseLinearOperator
    lazy = {
        "A": [
            DiagLinearOperator(vector),
            dense(given.A[1]),
            KroneckerProductLinearOperator(dense(normal(2, 3)), dense(normal(2, 2, seed=1))),
        ],
        "B": [
            IdentityLinearOperator(4, dtype=F64),
            KroneckerProductLinearOperator(dense(normal(3, 2)), dense(normal(2, 3, seed=2))),
            ToeplitzLinearOperator(vector),
        ],
        "Q": [None, None, None, LowRankRootLinearOperator(root)],
        "R": [
            BlockDiagLinearOperator(dense(blocks)),
            KroneckerProductLinearOperator(*map(dense, definite)),
            ConstantDiagLinearOperator(torch.full((1,), 2.0, dtype=F64), diag_shape=4),
        ],
    }
    for name, part in lazy.items():
        for t, operator in enumerate(part):
            if operator is not None:
                getattr(given, name)[t] = operator.to_dense()
    return given, given.problem(**lazy, S=None)


@pytest.mark.parametrize("method", ["riccati", "cg", "dual", "low_rank"])
def test_linear_operators_are_taken_as_they_are(method):
    given, problem = operators()
    controls, _, objective = given.kkt()
    solution = lq.solve(problem, method, rtol=1e-12)
    close(solution.step, torch.cat(controls))
    close(problem.objective(solution.step), objective)
    close(problem.gain(1).to_dense(), lq.solve(problem, "riccati").gains[1].to_dense())


def test_a_large_control_cost_without_a_known_inverse_says_so(monkeypatch):
    _, problem = operators()
    monkeypatch.setattr("llqr_mf.operators.apply.DENSE_INVERSE", 3)
    with pytest.raises(NotImplementedError, match="inverse of a BlockDiagLinearOperator of size 4"):
        lq.solve(problem, "dual")
    assert lq.solve(problem, "cg").status.ok


def test_no_operator_is_written_out_by_products(monkeypatch):
    """A 2000-state problem of diagonals never forms a matrix of that size."""
    n = 2000
    diagonal = [DiagLinearOperator(normal(n, seed=seed).abs() + 0.1) for seed in range(3)]
    problem = lq.LQRProblem(
        **{"A": diagonal[:1], "B": diagonal[1:2], "Q": [None, diagonal[2]], "R": [1.0]},
        x0=normal(n),
    )
    monkeypatch.setattr(DiagLinearOperator, "to_dense", None)
    solution = lq.solve(problem, rtol=1e-10)
    assert solution.method == "cg" and "large (2000)" in solution.status.message
    a, b, c = (d._diag for d in diagonal)
    close(solution.step, -b * c * a * normal(n) / (1 + b * c * b))


# ---- what does not fit


def wrong(message, **change):
    return pytest.param(change, message, id=next(iter(change)) + " " + message[:30])


Z = torch.zeros
WRONG = [
    wrong("A is empty", A=[]),
    wrong(r"A\[0\] must be a matrix", A=[Z(2, dtype=F64), Z(2, 2, dtype=F64)]),
    wrong(r"A\[0\] has shape \(2, 2\), not \(3, 2\)", A=[Z(2, 2, dtype=F64), Z(2, 3, dtype=F64)]),
    wrong(r"B has 1 entries, not 2", B=[Z(2, 1, dtype=F64)]),
    wrong(r"B\[1\] must be a matrix", B=[Z(2, 1, dtype=F64), None]),
    wrong(r"B\[0\] has shape \(3, 1\), not \(2, 1\)", B=[Z(3, 1, dtype=F64), Z(2, 1, dtype=F64)]),
    wrong(r"Q has 2 entries, not 3", Q=[None, None]),
    wrong(r"Q\[2\] has shape \(1, 1\), not \(2, 2\)", Q=[None, None, Z(1, 1, dtype=F64)]),
    wrong(r"Q\[0\] is not symmetric", Q=[normal(2, 2), None, None]),
    wrong(r"R\[0\] has shape \(2, 2\), not \(1, 1\)", R=[Z(2, 2, dtype=F64), 1.0]),
    wrong(r"R\[1\] is nan: give a finite number", R=[1.0, float("nan")]),
    wrong(r"R\[0\] has shape \(1,\)", R=[Z(1, dtype=F64), 1.0]),
    wrong(r"S\[0\] has shape \(2, 1\), not \(1, 2\)", S=[Z(2, 1, dtype=F64), None]),
    wrong(r"q\[2\] has shape \(3,\), not \(2,\)", q=[None, None, Z(3, dtype=F64)]),
    wrong(r"r\[0\] has shape \(1, 1\), not \(1,\)", r=[Z(1, 1, dtype=F64), None]),
    wrong(r"f has 3 entries, not 2", f=[None, None, None]),
    wrong(r"x0 has shape \(1,\), not \(2,\)", x0=Z(1, dtype=F64)),
    wrong(r"x0 has entries that are NaN", x0=torch.full((2,), float("nan"), dtype=F64)),
    wrong(r"x0 is torch.float32 .*convert", x0=Z(2)),
    wrong(r"Q\[2\] is torch.float32 .*convert", Q=[None, None, torch.eye(2)]),
    wrong(r"A\[0\] has entries that are NaN", A=[torch.full((2, 2), float("inf"), dtype=F64)] * 2),
    wrong(r"x0 is torch.float64 on meta", x0=Z(2, dtype=F64, device="meta")),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_what_does_not_fit_is_named(change, message):
    given = Matrices([2, 2, 2], [1, 1])
    with pytest.raises(ValueError, match=message):
        given.problem(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"Q": [None, None, 1.0]}, r"Q\[2\] is a float: give a tensor or a LinearOperator"),
        ({"R": ["1", 1.0]}, r"R\[0\] is a str"),
        ({"x0": [1.0, 2.0]}, r"x0 is a list: give a tensor of shape \(2,\)"),
    ],
)
def test_what_is_no_matrix_is_named(change, message):
    with pytest.raises(TypeError, match=message):
        Matrices([2, 2, 2], [1, 1]).problem(**change)


def test_with_damping_replaces_the_control_cost():
    given = Matrices([2, 3, 2], [2, 1])
    problem = given.problem()
    other = problem.with_damping([2.0, DiagLinearOperator(torch.full((1,), 3.0, dtype=F64))])
    fresh = given.problem(R=[2.0, 3 * torch.eye(1, dtype=F64)])
    close(other.hessian.to_dense(), fresh.hessian.to_dense())
    close(other.gradient, fresh.gradient)
    close(problem.hessian.to_dense(), given.problem().hessian.to_dense())
    with pytest.raises(ValueError, match="goes with a network"):
        problem.with_damping({"u0": 1.0})
