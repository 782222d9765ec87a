"""The cross-layer map against dense blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import ZOO
from torch import Tensor, nn

import llqr_mf as lq
from llqr_mf.gram import closed_form_gram, grams_of_groups
from llqr_mf.preconditioners.layerwise import layer_blocks
from llqr_mf.probe.cross_layer import CrossLayer, cross_layer


def zoo_problem(name: str, metric: str = "gauss_newton", damping: float = 0.1) -> lq.LQRProblem:
    model, inputs, targets, loss = ZOO[name]()
    return lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric=metric, damping=damping
    )


def dense_norms(problem: lq.LQRProblem, blocks: list[tuple[int, ...]]) -> Tensor:
    dense = problem.hessian.to_dense() - 0.1 * torch.eye(problem.size, dtype=problem.dtype)
    places = [problem.layout.places(mine) for mine in blocks]
    rows = [torch.stack([dense[a][:, b].norm() for b in places]) for a in places]
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet_eval", "encoder_pre_norm"])
def test_the_exact_map_is_that_of_the_dense_blocks(name: str) -> None:
    problem = zoo_problem(name)
    found = cross_layer(problem, decrease=False)
    expected = dense_norms(problem, layer_blocks(problem))
    if found.method == "gram":
        # The root of an inner product with roundings of |G_s||G_t|: half the digits, at zero.
        scale = expected.diagonal().sqrt()
        assert bool(((found.norms - expected).abs() <= 1e-7 * scale[:, None] * scale).all())
        assert bool((found.standard_error == 0).all())
    else:
        assert bool(((found.norms - expected).abs() <= 5 * found.standard_error).all())
    assert found.coupling.diagonal().allclose(torch.ones(len(expected)).double())


def test_which_nets_have_an_exact_map() -> None:
    methods = {
        name: cross_layer(zoo_problem(name), decrease=False).method
        for name in ("mlp", "convnet", "resnet_train", "tied_transpose")
    }
    assert methods == {
        "mlp": "gram",
        "convnet": "gram",
        "resnet_train": "hutchinson",
        "tied_transpose": "hutchinson",
    }


def test_the_layers_gram_matrices_add_up_to_the_whole() -> None:
    problem = zoo_problem("mlp", damping=1.0)
    grams = grams_of_groups(problem, layer_blocks(problem))
    assert grams is not None
    whole = closed_form_gram(problem)
    assert isinstance(whole, Tensor)
    torch.testing.assert_close(torch.stack(grams).sum(0), whole, rtol=1e-12, atol=1e-14)


def test_groups_by_pattern() -> None:
    problem = zoo_problem("mlp")
    groups = ["*.weight", "*.bias"]
    found = cross_layer(problem, groups=groups, decrease=False)
    expected = dense_norms(problem, [problem.layout.select(g) for g in groups])
    torch.testing.assert_close(found.norms, expected, rtol=1e-10, atol=1e-12)
    assert found.names == ("*.weight", "*.bias")
    assert sum(found.sizes) == problem.size
    with pytest.raises(ValueError, match="once"):
        cross_layer(problem, groups=["*.weight"])
    with pytest.raises(ValueError, match="once"):
        cross_layer(problem, groups=["*", "*.bias"])


@pytest.mark.parametrize("metric", ["gauss_newton", "newton"])
def test_estimates_cover_the_dense_blocks(metric: str) -> None:
    problem = zoo_problem("mlp", metric)
    expected = dense_norms(problem, layer_blocks(problem)).square()
    total, hits, seeds = torch.zeros_like(expected), 0, 40
    spread = torch.zeros_like(expected)
    for seed in range(seeds):
        found = cross_layer(
            problem, method="hutchinson", vectors=12, seed=seed, decrease=False, columns=12
        )
        squares, error = found.norms.square(), 2 * found.norms * found.standard_error
        total += squares / seeds
        spread += error.square() / seeds**2
        # Student's t with 11 degrees of freedom at 95 %.
        hits += int(((squares - expected).abs() <= 2.201 * error).sum())
    assert bool(((total - expected).abs() <= 4 * spread.sqrt()).all()), "unbiased"
    cells = expected.numel() * seeds
    # Few samples of a skewed square: a t interval loses some points; it may not lose many.
    assert 0.85 <= hits / cells <= 0.99


def test_the_map_is_symmetric_and_does_not_depend_on_the_columns(tmp_path: Path) -> None:
    problem = zoo_problem("resnet_train")
    one = cross_layer(problem, vectors=6, columns=1, decrease=False)
    many = cross_layer(problem, vectors=6, columns=4, decrease=False)
    torch.testing.assert_close(one.norms, many.norms, rtol=1e-10, atol=0)
    assert torch.equal(one.norms, one.norms.mT)
    path = tmp_path / "cross.pt"
    kept = cross_layer(problem, vectors=6, columns=1, decrease=False, checkpoint=path)
    again = cross_layer(problem, vectors=6, columns=1, decrease=False, checkpoint=path)
    assert torch.equal(kept.norms, again.norms) and torch.equal(kept.norms, one.norms)
    assert kept.products == again.products == 6 * len(kept.names)
    with pytest.raises(ValueError, match="'damping'"):
        other = problem.with_damping(1e3)
        cross_layer(other, vectors=6, columns=1, decrease=False, checkpoint=path)
    with pytest.raises(ValueError, match="another computation"):
        cross_layer(problem, vectors=6, columns=1, seed=1, decrease=False, checkpoint=path)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet_train"])
def test_what_the_off_diagonal_blocks_are_worth(name: str) -> None:
    problem = zoo_problem(name)
    found = cross_layer(problem, vectors=2, rtol=1e-10)
    dense, g = problem.hessian.to_dense(), problem.gradient
    u = torch.zeros_like(g)
    for mine in layer_blocks(problem):
        place = problem.layout.places(mine)
        u[place] = -torch.linalg.solve(dense[place][:, place], g[place])
    best = -g @ torch.linalg.solve(dense, g) / 2
    objective = g @ u + u @ dense @ u / 2
    multiple = -((g @ u) ** 2) / (2 * u @ dense @ u)
    assert found.fraction == pytest.approx(float(objective / best), rel=1e-6)
    assert found.best_fraction == pytest.approx(float(multiple / best), rel=1e-6)
    assert found.lost == pytest.approx(1 - found.fraction)


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "cross_entropy"])
@pytest.mark.parametrize("damping", [1e-4, 10.0])
def test_shares_by_gram_matrices_are_those_by_solves(loss: str, damping: float) -> None:
    model, inputs, targets, _ = ZOO["mlp"]()
    if loss != "cross_entropy":
        targets = torch.rand(len(inputs), 3, generator=torch.Generator().manual_seed(2)).double()
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, damping=damping
    )
    by_grams = cross_layer(problem)
    by_solves = cross_layer(problem, method="hutchinson", vectors=2, rtol=1e-11)
    assert by_grams.products == 0 and by_solves.products > 0
    # The solves are relative to 1e-11 with condition numbers up to 1e4.
    assert by_grams.fraction == pytest.approx(by_solves.fraction, rel=1e-5)
    assert by_grams.best_fraction == pytest.approx(by_solves.best_fraction, rel=1e-5)


def test_a_slope_outside_of_the_metric_falls_back_to_solves() -> None:
    problem = zoo_problem("mlp", "fisher_mc")
    found = cross_layer(problem)
    assert found.method == "gram" and found.products > 0
    by_solves = cross_layer(problem, method="hutchinson", vectors=2)
    assert found.fraction == pytest.approx(by_solves.fraction, rel=1e-4)


def test_one_linear_layer_has_nothing_across() -> None:
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    model = nn.Linear(5, 3).double()
    problem = lq.LQRProblem.from_network(lq.split(model), x, y, loss="mse")
    found = cross_layer(problem)
    assert found.fraction == pytest.approx(1.0) and found.off_diagonal_share == pytest.approx(0)
    two = cross_layer(problem, groups=["weight", "bias"])
    assert two.fraction is not None and two.fraction < 1


def test_a_stream_has_the_map_of_the_whole_batch() -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    layers, options = lq.split(model), {"loss": loss, "damping": 0.1}
    chunks = lq.StreamedProblem.chunks(inputs, targets, 3)
    streamed = lq.StreamedProblem(layers, chunks, **options)
    whole = lq.LQRProblem.from_network(layers, inputs, targets, **options)
    asked = {"method": "hutchinson", "vectors": 5, "decrease": False}
    a, b = (cross_layer(problem, **asked) for problem in (streamed, whole))
    torch.testing.assert_close(a.norms, b.norms, rtol=1e-10, atol=1e-12)
    assert a.names == b.names and a.products == b.products
    with pytest.raises(ValueError, match="decrease=False"):
        cross_layer(streamed)


def test_an_indefinite_problem_has_a_map_and_says_why_it_has_no_step() -> None:
    model, inputs, targets, loss = ZOO["mlp"]()
    problem = lq.LQRProblem.from_network(
        lq.split(model), inputs, targets, loss=loss, metric="newton", damping=0.0
    )
    found = cross_layer(problem, vectors=2)
    assert found.fraction is None and found.lost is None
    assert "negative" in found.note and found.note in str(found)


def test_report_and_picture() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    found: CrossLayer = cross_layer(zoo_problem("mlp"))
    assert "off-diagonal share" in str(found)
    assert found.to_dict()["coupling"][0][0] == pytest.approx(1)
    ax = found.plot()
    assert [t.get_text() for t in ax.get_xticklabels()] == list(found.names)
    plt.close(ax.figure)


def test_bad_input() -> None:
    problem = zoo_problem("resnet_train")
    with pytest.raises(ValueError, match="hutchinson"):
        cross_layer(problem, method="gram")
    with pytest.raises(ValueError, match="method"):
        cross_layer(problem, method="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vectors"):
        cross_layer(problem, vectors=1)
    with pytest.raises(TypeError, match="needs a problem"):
        cross_layer(problem.hessian)  # type: ignore[arg-type]
