"""The examples and the README's code run as they stand, in a short form."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import llqr_mf as lq

ROOT = Path(__file__).parent.parent


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--output", str(tmp_path), "--width", "32", "--batch", "8", "--steps", "2"]
    report = load(ROOT / "examples" / "demo.py").main(short)
    printed = capsys.readouterr().out
    assert all(row["agreement"] < 1e-4 for row in report["methods"])
    assert "riccati" in printed
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "demo.json").read_text())["training"][0]["name"] == "exact GN"


def test_probe_spectrum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--output", str(tmp_path), "--width", "8", "--steps", "5", "--samples", "64"]
    short += ["--top", "2", "--vectors", "2", "--lanczos", "8", "--products", "12"]
    main = load(ROOT / "examples" / "probe_spectrum.py").main
    report = main(short)
    assert "xtrace" in capsys.readouterr().out
    assert (tmp_path / "probe_spectrum.png").stat().st_size > 10_000
    kept = json.loads((tmp_path / "probe_spectrum.json").read_text())
    assert kept["newton"]["largest"]["values"] == report["newton"]["largest"]["values"]
    resumed = [*short, "--stream", "--samples", "900", "--resume", str(tmp_path / "state")]
    first, again = main(resumed), main(resumed)
    assert first["newton"]["density"] == again["newton"]["density"]


def test_probe_cross_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--output", str(tmp_path), "--width", "8", "--depth", "2", "--steps", "5"]
    report = load(ROOT / "examples" / "probe_cross_layer.py").main([*short, "--samples", "16"])
    assert "off-diagonal share" in capsys.readouterr().out
    assert report["after"]["cross_layer"]["method"] == "gram"
    assert (tmp_path / "probe_cross_layer.png").stat().st_size > 10_000


def test_how_good_is_kfac(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--output", str(tmp_path), "--width", "8", "--steps", "5", "--samples", "32"]
    short += ["--batches", "2", "--vectors", "2", "--lanczos", "20"]
    report = load(ROOT / "examples" / "how_good_is_kfac.py").main(short)
    assert "CG iterations" in capsys.readouterr().out
    shares = {row["name"]: row["best_fraction"] for row in report["compare"]["rows"]}
    assert 0 < shares["scaled identity"] < shares["layerwise, this batch"] <= 1
    assert (tmp_path / "how_good_is_kfac.png").stat().st_size > 10_000


def test_edge_of_stability(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--output", str(tmp_path), "--width", "8", "--steps", "4", "--every", "2"]
    report = load(ROOT / "examples" / "edge_of_stability.py").main([*short, "--samples", "64"])
    assert "sharpness at 0" in capsys.readouterr().out
    assert [point["step"] for point in report["runs"][0]["history"]] == [0, 2, 4]
    assert (tmp_path / "edge_of_stability.png").stat().st_size > 10_000


def test_demo_of_preconditioners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--output", str(tmp_path), "--steps", "3"]
    report = load(ROOT / "examples" / "demo_preconditioners.py").main(short)
    printed = capsys.readouterr().out
    assert "LLQR EKronecker" in printed
    share = {row["name"]: row["fraction"] for row in report["structures"]["rows"]}
    assert share["LLQR EKronecker"] > max(share["EKFAC"], share["K-FAC"], share["Jacobi"])
    assert len(report["training"]) == 4
    assert (tmp_path / "demo_preconditioners.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", ["README.md"])
def test_code_in_pages_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_code_in_the_page_on_probing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=generator).double()
    y = torch.randn(48, 2, generator=generator).double()
    model = nn.Sequential(
        OrderedDict(encoder=nn.Sequential(nn.Linear(6, 8), nn.Tanh()), head=nn.Linear(8, 2))
    ).double()
    labels = (x.sum(1) > 0).long()
    known = {
        "torch": torch,
        "lq": lq,
        "my_product": lambda v: 2 * v,
        "size": 10,
        "model": model,
        "dataset": torch.utils.data.TensorDataset(x, labels),
        "problem": lq.LQRProblem.from_network(lq.split(model), x, y, loss="mse"),
        "x": x,
        "y": y,
        "x_test": x[:3],
    }
    page = (ROOT / "docs" / "probing.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "docs/probing.md", "exec"), known)
    assert known["f"].mean.shape == (3, 2)
    assert (tmp_path / "runs" / "density" / "header.pt").exists()


def test_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Every step goes down and converges; ten end at less than a tenth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y = torch.randn(24, 6).double(), torch.randn(24, 1).double()
    losses, ends = load(ROOT / "examples" / "first_step.py").train(model, x, y)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 10
    assert set(ends) == {"converged"}
    assert f"{losses[0]:.3g} -> {losses[1]:.3g}" in capsys.readouterr().out
