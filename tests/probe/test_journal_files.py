"""A folder that is shared, damaged, cut off or of something else: the right numbers, or a word."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llqr_mf.operators.from_function import from_function
from small_models import F64, mlp, normal
from torch import Tensor

import llqr_mf as lq
from llqr_mf.probe import journal
from llqr_mf.probe.journal import HEADER, Journal

SIZE = 20
PART = "probes_2_4.pt"


def operator(size: int = SIZE) -> Tensor:
    made = normal(size, size)
    return made @ made.mT / size + torch.eye(size, dtype=F64)


def run(path: Path | None, A: Any = None, **options: Any) -> Any:
    asked = {"products": 6, "method": "hutchinson", "columns": 2, **options}
    return lq.probe.trace(operator() if A is None else A, checkpoint=path, **asked)


def rewritten(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        torch.save(change(torch.load(file)), file)

    return damage


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def one_bit(file: Path) -> None:
    held = torch.load(file)
    first = held[0] if isinstance(held, list) else held["fingerprint"]
    data, place = bytearray(file.read_bytes()), file.read_bytes().find(first.numpy().tobytes())
    assert place > 0
    data[place + 6] ^= 0x10
    file.write_bytes(bytes(data))


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


UNREADABLE: dict[str, Callable[[Path], None]] = {
    "short": shorten,
    "empty": lambda file: file.write_bytes(b""),
    "other bytes": lambda file: file.write_bytes(b"text " * 100),
    "directory": directory,
    "another type": rewritten(lambda held: 5),
}
CHANGED: dict[str, Callable[[Path], None]] = {
    **UNREADABLE,
    "one bit": one_bit,
    "nan": rewritten(lambda held: [held[0] * torch.nan, *held[1:]]),
    "more samples": rewritten(lambda held: [held[0].repeat(4), *held[1:]]),
    "fewer tensors": rewritten(lambda held: held[1:]),
    "another dtype": rewritten(lambda held: [held[0].float(), *held[1:]]),
    "another part": lambda file: file.write_bytes((file.parent / "probes_0_2.pt").read_bytes()),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_damaged_part_is_named_and_computed_again_once_it_is_gone(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "t"
    whole = run(folder)
    CHANGED[name](folder / PART)
    with pytest.raises(ValueError, match=rf"{PART}' is damaged .*delete it.*computed again"):
        run(folder)
    if name == "directory":
        (folder / PART).rmdir()
    else:
        (folder / PART).unlink()
    assert torch.equal(run(folder).value, whole.value)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_damaged_header_is_named(name: str, tmp_path: Path) -> None:
    run(tmp_path / "t")
    UNREADABLE[name](tmp_path / "t" / HEADER)
    with pytest.raises(ValueError, match=rf"{HEADER}' is damaged .*delete the folder"):
        run(tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: {**held, "format": 1}, "files of format 1.*another version"),
        (lambda held: {k: v for k, v in held.items() if k != "format"}, "files of format None"),
        (lambda held: {k: v for k, v in held.items() if k != "fingerprint"}, "is damaged"),
        (lambda held: {**held, "fingerprint": held["fingerprint"][:1]}, "another operator"),
        (lambda held: {**held, "fingerprint": held["fingerprint"] * torch.nan}, "another operator"),
    ],
)
def test_a_header_of_another_kind_is_refused(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    run(tmp_path / "t")
    rewritten(change)(tmp_path / "t" / HEADER)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "t")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    run(tmp_path / "t")
    torch.save(Evil(), tmp_path / "t" / PART)
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path / "t")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [HEADER, PART])
def test_a_run_killed_while_it_wrote_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is a file under another name, half of it."""
    folder, save = tmp_path / "t", torch.save

    def killed(held: Any, file: Path) -> None:
        save(held, file)
        if file.name.startswith(name):
            shorten(file)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Nobody is there to take the file away, either.
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    assert any(file.name.startswith(name) for file in folder.iterdir())
    assert torch.equal(run(folder).value, run(None).value)


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Journal(tmp_path / "t", {}, torch.zeros(1))

    def full(held: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        kept.put("a", (torch.zeros(1),))
    assert [file.name for file in (tmp_path / "t").iterdir()] == [HEADER]


def test_threads_share_a_folder(tmp_path: Path) -> None:
    """As processes do: each writes under a name of its own."""
    expected, found, workers = run(None).value, [], 4
    start = threading.Barrier(workers)

    def work() -> None:
        start.wait()
        found.append(run(tmp_path / "t").value)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == workers and all(torch.equal(value, expected) for value in found)
    names = sorted(file.name for file in (tmp_path / "t").iterdir())
    assert names == [HEADER, "probes_0_2.pt", "probes_2_4.pt", "probes_4_6.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_writers_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """One is in the middle of a file while the other writes all of it."""
    if not links:

        def none(source: Any, place: Any) -> None:
            raise OSError("no hard links")

        monkeypatch.setattr(os, "link", none)
    folder, save, depth = tmp_path / "t", torch.save, []

    def slow(held: Any, file: Path) -> None:
        if len(depth) < 2:
            depth.append(file)
            run(folder)
        save(held, file)

    monkeypatch.setattr(torch, "save", slow)
    assert torch.equal(run(folder).value, run(None).value)


def test_two_that_begin_at_once_and_differ_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t"
    run(folder)
    # The other one looked before that header was there.
    monkeypatch.setattr(Journal, "_is_free", lambda self: True)
    with pytest.raises(ValueError, match="another computation"):
        run(folder, seed=1)
    monkeypatch.undo()
    assert torch.equal(run(folder).value, run(None).value)


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint is an empty path"):
        run("")  # type: ignore[arg-type]


# ---- what tells one computation from another


def problem(damping: Any) -> lq.LQRProblem:
    model = mlp(3, 4, 2, dtype=torch.float32)
    x, y = normal(6, 3, dtype=torch.float32), normal(6, 2, seed=1, dtype=torch.float32)
    return lq.LQRProblem.from_network(lq.split(model), x, y, loss="mse", damping=damping)


@pytest.mark.parametrize(
    "dampings", [(1e-9, 2e-9), ({"0": 1e-9, "2": 2e-9}, {"0": 2e-9, "2": 1e-9})]
)
def test_damping_below_the_rounding_of_a_product_tells(
    dampings: tuple[Any, Any], tmp_path: Path
) -> None:
    one, other = map(problem, dampings)
    v = torch.ones(one.size)
    # The operators cannot be told apart by what they do.
    assert torch.allclose(one.hessian @ v, other.hessian @ v, rtol=1e-6, atol=1e-7)
    run(tmp_path / "t", one)
    with pytest.raises(ValueError, match=r"another computation .*damping"):
        run(tmp_path / "t", other)


def pairs(path: Path, **options: Any) -> Any:
    asked = {"method": "lobpcg", "which": "smallest", **options}
    return lq.probe.eigenvalues(operator(), 2, checkpoint=path, **asked)


@pytest.mark.parametrize("name", ["initial", "preconditioner", "function"])
def test_starts_and_preconditioners_tell(name: str, tmp_path: Path) -> None:
    start, M = normal(SIZE, 2, seed=5), operator().inverse()
    M = (M + M.mT) / 2
    made: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "initial": ({"initial": start}, {"initial": start + 1e-9}),
        "preconditioner": ({"preconditioner": M}, {"preconditioner": 1.001 * M}),
        "function": ({"preconditioner": lambda v: v @ M}, {"preconditioner": lambda v: v / 3}),
    }
    same, other = made[name]
    first = pairs(tmp_path / "t", **same)
    assert torch.equal(pairs(tmp_path / "t", **same).values, first.values)
    for changed in (other, {}):
        with pytest.raises(ValueError, match="another"):
            pairs(tmp_path / "t", **changed)


def test_preconditioners_of_one_determinant_tell(tmp_path: Path) -> None:
    d = torch.linspace(0.5, 2, SIZE, dtype=F64)
    options = {"vectors": 2, "checkpoint": tmp_path / "t"}
    lq.probe.logdet(operator(), preconditioner=d.diag(), **options)
    with pytest.raises(ValueError, match=r"another operator.*preconditioner"):
        lq.probe.logdet(operator(), preconditioner=d.flip(0).diag(), **options)


def test_a_fingerprint_makes_no_products_of_its_own_for_nothing(tmp_path: Path) -> None:
    calls: list[int] = []

    def product(v: Tensor) -> Tensor:
        calls.append(len(v))
        return v @ operator()

    A = from_function(product, SIZE, dtype=F64, rows=True)
    run(tmp_path / "t", A)
    run(tmp_path / "t", A)
    assert calls == [1, 2, 2, 2, 1]


def test_what_is_not_finite_is_said_before_anything_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        run(tmp_path / "t", from_function(lambda v: v * torch.nan, SIZE, dtype=F64, rows=True))
    assert not (tmp_path / "t").exists()


def test_every_dtype_is_kept_and_checked(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "t", {}, torch.zeros(1))
    given = (
        *(torch.arange(6).to(d) for d in (torch.bfloat16, torch.float16, F64, torch.bool)),
        *(torch.tensor(3), torch.zeros(0, 2), normal(4, 3).mT),
    )
    kept.put("a", given)
    for a, b in zip(kept.get("a") or (), given, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert journal.FORMAT == 2
