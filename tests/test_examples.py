"""The examples and the README's code run as they stand, in a short form."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

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
