"""The example and the benchmark beside laplace-torch, in a short form."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
SHORT = [
    *("--rows", "60", "--test-rows", "40", "--width", "16", "--epochs", "4"),
    *("--digit-rows", "40", "--digit-width", "16"),
]
HEAD = "carat,cut,color,clarity,depth,table,price,x,y,z\n"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gems(count: int) -> str:
    rows = []
    for i in range(count):
        cut, colour = ("Ideal", "Fair")[i % 2], "DEF"[i % 3]
        carat = 0.2 + (i * 7 % count) / count
        price = 500 * carat**1.7 * (1 + 0.1 * (i % 3))
        rows.append(f"{carat},{cut},{colour},SI{i % 2},{60 + i % 5},{55 + i % 4},{price},4,4.1,2.4")
    return HEAD + "\n".join(rows) + "\n"


@pytest.mark.parametrize("kind", ["csv", "wheel"])
def test_example(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    data = tmp_path / "diamonds.csv"
    data.write_text(varied(gems(100)))
    if kind == "wheel":
        wheel = tmp_path / "plotnine.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(data, "plotnine/data/diamonds.csv")
        data = wheel
    example = load(ROOT / "examples" / "laplace_wide_regression.py")
    report = example.main(["--data", str(data), "--output", str(tmp_path), *SHORT])
    printed = capsys.readouterr().out
    assert "diamonds, log price" in printed and "effective parameters" in printed
    assert (tmp_path / "laplace_wide_regression.png").stat().st_size > 10_000
    kept = json.loads((tmp_path / "laplace_wide_regression.json").read_text())
    assert kept["regression"]["rows"] == 60 and report["regression"]["noise variance"] > 0
    assert [row["name"] for row in kept["classification"]["scores"]][:2] == [
        "trained",
        "Laplace, Monte-Carlo",
    ]


def varied(text: str) -> str:
    """No column of one value only, which could not be standardised."""
    lines = text.splitlines()
    made = [lines[0]]
    for i, line in enumerate(lines[1:]):
        made.append(line.replace("4,4.1,2.4", f"{4 + i % 7 / 10},{4.1 + i % 3 / 10},{2 + i % 4}"))
    return "\n".join(made) + "\n"


def test_without_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load(ROOT / "examples" / "laplace_wide_regression.py")
    example.main(["--output", str(tmp_path), *SHORT])
    printed = capsys.readouterr().out
    installed = importlib.util.find_spec("plotnine") is not None
    assert ("diamonds" if installed else "pip download --no-deps plotnine") in printed
    with pytest.raises(SystemExit, match="no such file"):
        example.main(["--data", str(tmp_path / "none.csv"), "--output", str(tmp_path)])


def test_benchmark(tmp_path: Path) -> None:
    benchmark = load(ROOT / "benchmarks" / "laplace_peers.py")
    path = tmp_path / "peers.json"
    short = ["--small", "4", "--widths", "--rows", "40", "--new", "10"]
    report = benchmark.main(["--output", str(path), *short])
    assert json.loads(path.read_text())["rows"] == report["rows"]
    assert report["rows"][0]["name"] == "llqr_mf, exact by the dual"
    full = [row for row in report["rows"] if row["name"] == "laplace-torch, full"]
    assert all(row["covariance error"] < 1e-6 for row in full)
    assert bool(full) == (benchmark.peer is not None)
