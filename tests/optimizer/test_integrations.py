"""The example loops run as they stand, in a short form; checkpoints go through their trainers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from optimizer.cases import assert_same

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str, *needs: str) -> ModuleType:
    for package in ("sklearn", *needs):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain(capsys):
    found = example("train_plain").main(["--steps", "40", "--width", "32", "--lr", "0.01"])
    assert found["accuracy"] > 0.7
    assert "ekronecker" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(dtype):
    found = example("train_amp").main(["--steps", "20", "--dtype", dtype])
    assert found["loss"] < 0.5 and found["scale"] == 2.0**16


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(tmp_path, precision):
    module = example("train_lightning", "lightning")
    path, common = str(tmp_path / "end.ckpt"), ["--precision", precision]
    first = module.main([*common, "--steps", "60", "--save", path])
    assert first["losses"][-1] < 0.8 * first["losses"][0]
    counts = first["optimizer"].counts
    assert (counts.steps, counts.skipped, counts.refreshes) == (60, 0, 2)
    assert set(torch.load(path, weights_only=False)["optimizer_states"][0]["llqr"]) > {"structure"}
    # The period is 50: after 60 steps the next refresh is at 100.
    resumed = module.main([*common, "--steps", "99", "--resume", path])
    assert resumed["losses"][0] < 0.9 * first["losses"][0]
    assert (resumed["optimizer"].counts.steps, resumed["optimizer"].counts.refreshes) == (99, 2)
    tensors = [run["optimizer"].structure.tensors for run in (first, resumed)]
    assert_same(*tensors)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("accumulate", [1, 2])
def test_transformers(tmp_path, accumulate):
    module = example("train_transformers", "transformers", "accelerate")
    common = ["--width", "16", "--accumulate", str(accumulate), "--steps", "56"]
    whole = module.main([*common, "--output", str(tmp_path), "--save-every", "30"])
    assert whole["losses"][-1] < 0.8 * whole["losses"][0]
    counts = whole["optimizer"].counts
    assert (counts.steps, counts.skipped, counts.refreshes) == (56, 0, 2)
    saved = str(tmp_path / "checkpoint-30")
    resumed = module.main([*common, "--output", str(tmp_path / "again"), "--resume", saved])
    # Their resume restores data order and random state, so the run ends bit for bit the same.
    states = [run["optimizer"].state_dict() for run in (whole, resumed)]
    assert_same(states[0]["llqr"], states[1]["llqr"])
    assert_same(states[0]["state"], states[1]["state"])
