"""The benchmarks of very wide layers in a tiny form: what they report, not how fast it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import llqr_mf as lq

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OURS = ("cost_tables", "exact_step", "harness", "hessian_free", "nets", "peak", "product_cost")
OURS = (*OURS, "large_batch", "scale", "step_methods")

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a benchmark by name, with small floors."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    harness = import_module("harness")
    monkeypatch.setattr(harness, "GEMM_SIZES", {"cpu": (32,)})
    monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 2**16})
    yield import_module
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.fixture
def measured(load: Load, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Peak memory without its processes, each a second or two: the tasks that were asked for."""
    asked: list[str] = []

    def in_this_process(task: str, arguments: dict[str, Any], *, device: str) -> dict[str, Any]:
        module, name = task.split(":")
        answer = getattr(import_module(module), name)(**arguments)()
        asked.append(arguments.get("method", task))
        return {"before": 0, "peak": 1000, "growth": 1000, "answer": answer}

    for module in ("product_cost", "exact_step", "scale", "cost_tables"):
        if module != "cost_tables" or _installed("matplotlib"):
            monkeypatch.setattr(load(module), "peak_memory", in_this_process)
    return asked


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def problem_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, damping: float) -> Any:
    return lq.LQRProblem.from_network(lq.split(model), x, y, loss="cross_entropy", damping=damping)


def test_limits_and_answers_of_interleaved_runs(load: Load) -> None:
    calls: list[str] = []
    seen: list[tuple[str, Any]] = []
    functions = {name: lambda n=name: calls.append(n) or len(calls) for name in "ab"}
    seconds = load("harness").interleaved(
        functions, repeats=3, warm_up=2, limits={"b": 1}, after=lambda *a: seen.append(a)
    )
    # b is slow: once, and no warm-up.
    assert calls == ["a", "a", "a", "b", "a", "a"]
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 1}
    assert seen == [("a", 3), ("b", 4), ("a", 5), ("a", 6)]


def test_floors_and_fits(load: Load) -> None:
    harness = load("harness")
    floor = harness.Floors(rate=100.0, size=1, rates={8: 50.0}, bandwidth=10.0)
    # Bytes decide: 40 / 10 > 200 / 100.
    row = floor.row(harness.Work(200.0, 40.0), 8.0, 8)
    assert row["over the floor"] == 2 and row["of the GEMM rate"] == 0.25
    assert row["of the GEMM rate at its shape"] == 0.5
    measured = harness.floors("cpu", widths=(16,), batch=4, repeats=1)
    assert measured.rate >= measured.rates[16] > 0 and measured.bandwidth > 0
    assert harness.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert harness.exponent([2], [3]) is None and harness.spread([1.0]) == 0


def test_formulas_count_what_torch_counts(load: Load) -> None:
    nets, counted = load("nets"), load("harness").counted
    model, x, y = nets.mlp(12, depth=3, batch=5, classes=4)
    parameters = list(model.parameters())

    def gradient() -> None:
        torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)

    assert nets.gradient_work(model, 5).flops == counted(gradient, 0).flops
    hessian = problem_of(model, x, y, 0.0).hessian
    v = torch.randn(1, hessian.shape[0])
    with torch.no_grad():
        product = counted(lambda: hessian.multiply_rows(v, torch.empty_like(v)), 0)
    assert nets.product_work(model, 5).flops == product.flops
    assert nets.size_of(model) == nets.mlp_size(12, 3, 4)
    # The batch, a Linear and a tanh per hidden layer, and the outputs.
    assert nets.activation_bytes(model, x) == 4 * (5 * 12 * 7 + 5 * 4)


def test_tiled_weights_look_random(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = load("nets")
    monkeypatch.setattr(nets, "TILE", 97)
    torch.manual_seed(0)
    model, _, _ = nets.mlp(32, depth=1, dtype=torch.float64, tiled=True)
    weight = model[0].weight.detach()
    assert weight.abs().max() <= 32**-0.5 and torch.linalg.matrix_rank(weight) == 32
    assert float(weight.std()) == pytest.approx((3 * 32) ** -0.5, rel=0.25)


def test_hessian_free_is_right(load: Load) -> None:
    torch.manual_seed(0)
    model, x, y = load("nets").mlp(10, depth=2, batch=7, classes=4, dtype=torch.float64)
    solve = load("hessian_free").gauss_newton_step
    step, iterations = solve(model, x, y, damping=1e-2, rtol=1e-10)
    problem = problem_of(model, x, y, 1e-2)
    exact = torch.linalg.solve(problem.hessian.to_dense(), -problem.gradient)
    # |u error| <= rtol |g| / damping.
    torch.testing.assert_close(step, exact, rtol=0, atol=1e-8 * float(problem.gradient.norm()))
    assert 0 < iterations < 100


def test_peak_memory_has_a_process_of_its_own(load: Load) -> None:
    arguments = {"width": 512, "method": "hessian_free", "damping": 1.0, "rtol": 0.5}
    found = load("peak").peak_memory("step_methods:prepare_memory", {**arguments, "device": "cpu"})
    weights = 4 * load("nets").mlp_size(512)
    # Vectors u, r, p and the product at least; not ten times as much, and not this process' peak.
    assert 4 * weights < found["growth"] < 12 * weights
    assert found["peak"] - found["before"] == found["growth"]
    assert "failed" in load("peak").peak_memory("harness:nothing", {})


def test_product_cost(load: Load, measured: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    given = ["--widths", "16", "--nets", "mlp", "--repeats", "2", "--output", str(path)]
    bench = load("product_cost")
    report = bench.main(given)
    (row,) = report["rows"]
    assert json.loads(path.read_text())["rows"] == [row]
    assert row["over the floor"] > 0 and "bandwidth bytes/s" in report["floors"]
    assert set(measured) >= {"product", "product into a buffer"}
    if _installed("curvlinops"):
        assert row["agreement met"] and row["memory target met"]
    slow = {
        "gradients per product into a buffer": 1.4,
        "gradients per product": 1.3,
        "gradients per curvlinops product": 2.0,
        "relative difference to curvlinops": 1e-3,
    }
    met = bench.targets(slow, linear=True)
    assert not met["cost target met"] and met["cost target met fresh"]
    assert not met["peer target met"] and not met["agreement met"]
    assert bench.targets(slow, linear=False)["cost target met"]


def test_nets_that_do_not_fit(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = load("product_cost")
    monkeypatch.setattr(bench, "available", lambda device: 10_000)
    given = ["--widths", "64", "--nets", "mlp", "--output", str(tmp_path / "rows.json")]
    (row,) = bench.main(given)["rows"]
    assert row["does not fit"]["bytes needed"] > 10_000


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_exact_step(load: Load, measured: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    bench = load("exact_step")
    given = "--widths 16 24 --dampings 1e-2 --rtols 1e-4 --repeats 1 --once-above 16".split()
    given += ["--tune-up-to", "16", "--output", str(path)]
    report = bench.main(given)
    rows = json.loads(path.read_text())["rows"]
    for row in (r for r in rows if "seconds" in r):
        assert row["reached"] and row["residual float64"] < 2e-4
    assert {r["width"] for r in rows if r["method"] == "dual" and "seconds" in r} == {16, 24}
    assert {e["method"] for e in report["exponents"]} >= {"dual", "cg", "hessian_free"}
    # Nothing may take this long: the wider net has estimates in place of the iterative methods.
    slow = bench.main([*given, "--max-seconds", "1e-9"])["rows"]
    wide = [r for r in slow if r["width"] == 24 and r["method"] in ("cg", "hessian_free")]
    assert len(wide) == 2
    for row in wide:
        assert "seconds" not in row and row["estimated seconds"] > 0
        assert row["shown seconds"].startswith("~")


@pytest.mark.parametrize("data", ["random", "digits"])
def test_true_residual_sees_a_wrong_step(load: Load, data: str) -> None:
    bench = load("step_methods")
    batch = bench.make(16, "cpu", data)
    answer = bench.SOLVERS["cg"](batch, 1e-2, 1e-5, 500)
    for dtype in (torch.float32, torch.float64):
        assert bench.true_residual(batch, 1e-2, answer.step, dtype) < 2e-5
        assert bench.true_residual(batch, 1e-2, answer.step * 1.01, dtype) > 5e-3
    assert bench.true_residual(batch, 1e-2, torch.zeros_like(answer.step)) == pytest.approx(1)


def test_scale(load: Load, measured: list[str], tmp_path: Path) -> None:
    bench = load("scale")
    given = ["--width", "16", "24", "10000000", "--output", str(tmp_path / "rows.json")]
    report = bench.main(given)
    assert report["widest"] == 24 and [row["fits"] for row in report["rows"]] == [True, True, False]
    row = report["rows"][1]
    assert row["residual"] < 1e-4 and row["weights per second"] > 0
    if bench.in_place_works():
        report = bench.main([*given, "--in-place"])
        assert report["widest"] == 24 and report["rows"][1]["residual"] < 1e-4
    else:
        with pytest.raises(SystemExit):
            bench.main([*given, "--in-place"])


def test_large_batch(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(import_module("llqr_mf.factors"), "DUAL_SIZE", 100)
    given = "--samples 150 --sub-sample 20 --width 16 --damping 1e-2 --rtols 1e-4".split()
    report = load("large_batch").main([*given, "--output", str(tmp_path / "rows.json")])
    plain, sketched = report["rows"][1], report["rows"][0]
    assert all(row["residual"] <= 1.1e-4 for row in report["rows"])
    assert "sketch" in sketched["status"] and sketched["iterations"] < plain["iterations"]


def test_cost_tables(
    load: Load, measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    bench = load("cost_tables")
    monkeypatch.setattr(bench, "CENTRE", {"width": 16, "depth": 1, "batch": 4, "classes": 3})
    sizes = "--width 16 24 --depth 1 2 --batch 4 8 --classes 2 3 --repeats 1".split()
    image, path = tmp_path / "cost.png", tmp_path / "rows.json"
    report = bench.main([*sizes, "--output", str(path), "--image", str(image)])
    assert len(report["rows"]) == 16 and len(report["exponents"]) == 16
    assert all(row["seconds"] > 0 for row in report["rows"])
    # Ten iterations of CG, and no Gram matrix: the constant stand-in's exponent is zero.
    flat = [e for e in report["exponents"] if e["of"] == "growth MB"]
    assert all(e["exponent"] == pytest.approx(0) for e in flat)
    assert image.stat().st_size > 10_000
