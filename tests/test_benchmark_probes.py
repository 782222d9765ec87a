"""The benchmark of the probing functions in a tiny form, without any peer: what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import probe_peers
import probe_solvers
import probes

PEERS = [name for name in probe_peers.TRACES if not name.startswith("lq")]


@pytest.fixture(scope="module")
def task() -> probe_peers.Task:
    return probe_peers.Task([64, 4, 10], 48, 20, 1e-3)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (probe_peers, probe_solvers, probes):
        monkeypatch.setattr(module, "peer", lambda name: None)


def test_the_dense_reference_is_that_of_the_operators(task: probe_peers.Task) -> None:
    for name in "GH":
        dense = task.problems[name].hessian.to_dense()
        assert task.diagonals[name].equal(dense.diagonal())
        torch.testing.assert_close(task.spectra[name].sum(), dense.trace())
        torch.testing.assert_close(task.spectra[name].square().sum(), dense.square().sum())
    # Positive semi-definite, and not.
    rounding = 1e-12 * task.scale("G")
    assert task.spectra["G"][0] > -rounding
    assert task.spectra["H"][0] < -rounding
    assert torch.equal(task.spectra["G + damping"], task.spectra["G"] + 1e-3)


def test_every_way_to_multiply_is_counted(task: probe_peers.Task) -> None:
    A = task.counted("H", most=15)
    dense = task.problems["H"].hessian.to_dense()
    x = torch.randn(task.n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for made, expected in (
        (A @ x, dense @ x),
        (x.mT @ A, x.mT @ dense),
        (A @ x[:, 0], dense @ x[:, 0]),
        (A.vector(x[:, 1]), dense @ x[:, 1]),
        (torch.from_numpy(A.to_scipy() @ x.numpy()), dense @ x),
        (torch.from_numpy(A.to_scipy() @ x[:, 0].numpy()), dense @ x[:, 0]),
        (A.ours @ x, dense @ x),
    ):
        torch.testing.assert_close(made, expected)
    assert A.vectors == 3 + 3 + 1 + 1 + 3 + 1 + 3
    with pytest.raises(probe_peers.OverBudget):
        A @ x[:, 0]


def test_only_right_pairs_count(task: probe_peers.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ("H", "largest", 2)
    reached, note = probe_solvers.products_to(task, "SciPy eigsh", case, 1e-3, 0, 1000)
    assert reached is not None and not note
    _, limited = probe_solvers.products_to(task, "SciPy eigsh", case, 1e-3, 0, 5)
    assert limited == "> 5"

    def wrong_end(task: Any, A: Any, k: int, which: str, *rest: Any) -> Any:
        return probe_solvers.arpack(task, A, k, "smallest", *rest)

    def no_vectors(task: Any, A: Any, k: int, which: str, *rest: Any) -> Any:
        values, vectors = probe_solvers.arpack(task, A, k, which, *rest)
        return values, vectors[::-1].copy()

    for solve, expected in ((wrong_end, "wrong pairs"), (no_vectors, "nothing tried gave it")):
        monkeypatch.setitem(probe_solvers.SOLVERS, "wrong", (None, solve, lambda _: [1e-6]))
        found = probe_solvers.products_to(task, "wrong", case, 1e-3, 0, 1000)
        assert found == (None, expected)


def test_distances_of_distributions_known_by_hand() -> None:
    spectrum = torch.tensor([-1.0, 0.0, 0.0, 1.0]).double()
    same = torch.tensor([[-1.0, 0.0, 1.0]]).double()
    exact = probes.distances(same, torch.tensor([[0.25, 0.5, 0.25]]), spectrum)
    assert max(exact) < 1e-12
    # A quarter of the mass goes from 0 to 1: the step is missed by it, smoothed or not.
    moved = probes.distances(same, torch.tensor([[0.25, 0.25, 0.5]]), spectrum)
    assert moved == pytest.approx((0.25, 0.25), abs=1e-6)
    moved = probes.distances(same, torch.tensor([[0.5, 0.25, 0.25]]), spectrum)
    assert moved == pytest.approx((0.25, 0.25), abs=1e-6)
    # Nodes that are near zero are not compared unsmoothed.
    near = torch.tensor([[-1.0, 1e-5, 1.0]]).double()
    smooth, far = probes.distances(near, torch.tensor([[0.25, 0.5, 0.25]]), spectrum)
    assert far < 1e-12 and 0 < smooth < 1e-3


@pytest.mark.usefixtures("alone")
def test_estimates_are_unbiased_and_their_errors_fall(task: probe_peers.Task) -> None:
    truth = {name: task.spectra[name].sum() for name in "GH"}
    rows = list(probes.estimate_rows(task, probe_peers.TRACES, truth, [12, 48], 30))
    names = [row["name"] for row in rows]
    assert len(rows) == 7 and names.count("lq xnystrace") == 1
    assert all(name.startswith("lq") for name in names)
    for row in rows:
        if row["name"] == "lq hutchinson":
            # Its variance for signs: 2 (|A|_F^2 - sum a_ii^2) / m.
            matrix = row["matrix"]
            rest = task.spectra[matrix].square().sum() - task.diagonals[matrix].square().sum()
            expected = (2 * float(rest) / 12) ** 0.5 / abs(float(truth[matrix]))
            assert 0.5 < row["12"] / expected < 1.6
        # In standard errors of the mean of 30.
        assert max(row["bias 12"], row["bias 48"]) < 4
        # The ratio of two deviations of 30 samples: 1 +- 0.13, and 4 times that.
        assert 0.45 < row["stated 48"] < 2.5
        assert row["48"] < row["12"]


def test_all_of_it(
    alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    output, image = tmp_path / "probes.json", tmp_path / "probes.png"
    small = "--sizes 64 4 10 --rows 32 --steps 10 --seeds 2 --few 2 --starts 1 --limit 400"
    small += " --targets 1e-2 1e-3 --budgets 12 24 --vectors 2 4 --shapes 2x8 4x8"
    told = probes.main([*small.split(), "--output", str(output), "--image", str(image)])
    held = json.loads(output.read_text())
    assert held["rows"] == told["rows"] and held["weights"] == 64 * 4 + 4 + 40 + 10
    assert held["torch"] == torch.__version__ and held["device"]
    assert held["versions"]["curvlinops-for-pytorch"] is None
    sections = {row["section"] for row in held["rows"]}
    assert sections == {
        "agreement",
        "float32",
        "eigenvalues",
        "trace",
        "diagonal",
        "density",
        "logdet",
    }
    for row in held["rows"]:
        assert row["name"].split(",")[0].split(" ")[0] in ("lq", "SciPy", "linear_operator")
        if row["section"] == "eigenvalues" and row["name"] == "lq Lanczos":
            assert row["0.01"] is not None and row["0.01"] <= row["0.001"]
        if row["section"] == "agreement":
            assert row["difference"] < 1e-5
        if row["section"] == "logdet":
            assert "note" not in row, row
            assert row["products 2"] < row["products 4"]
    assert image.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "lq Lanczos" in text and "eigenvalues: products to a residual" in text

    again = tmp_path / "again.png"
    probes.main(["--output", str(output), "--redraw", str(again)])
    assert again.exists()


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_there_estimates_the_same_trace(task: probe_peers.Task, name: str) -> None:
    needs, function = probe_peers.TRACES[name]
    assert needs is not None
    pytest.importorskip("skerch.algorithms" if needs == "skerch" else needs)
    truth, estimates = float(task.spectra["G"].sum()), []
    for seed in range(10):
        A = task.counted("G")
        estimates.append(float(function(A, 24, seed)[0]))
        assert A.vectors == 24
    made = torch.tensor(estimates)
    assert abs(float(made.mean()) - truth) < 5 * float(made.std()) / 10**0.5
