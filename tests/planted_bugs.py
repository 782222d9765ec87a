# ruff: noqa: E501
"""Plants bugs, one at a time, and runs the tests that should see each.

    python tests/planted_bugs.py            # all of them; minutes
    python tests/planted_bugs.py snapshot   # those whose file or line holds a word

A test must be able to fail: whoever adds one adds a line here that makes it. The file is put back
after every run; do not edit it meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Bug(NamedTuple):
    """What stands somewhere once, what is put in its place, and the tests to run."""

    file: str
    right: str
    wrong: str
    tests: str


NETWORK = "llqr_mf/network"
KEPT = "tests/network/test_kept_layers.py"
USER = "tests/network/test_user_code.py"
SNAPSHOT = "tests/network/test_snapshot.py"
THREADS = "tests/network/test_threads.py"
VIEWS = "tests/network/test_overwritten_views.py"
PLAIN = "tests/network/test_plain.py"

BUGS = [
    # ---- what the weights were
    Bug(
        f"{NETWORK}/snapshot.py",
        "    return torch.cat([made, rest.to(torch.int64)])",
        "    return made",
        SNAPSHOT,
    ),
    Bug(f"{NETWORK}/snapshot.py", "WIDTH = 2039", "WIDTH = 2048", SNAPSHOT),
    Bug(f"{NETWORK}/snapshot.py", "made[: len(words) - whole] += words[whole:]", "pass", SNAPSHOT),
    Bug(f"{NETWORK}/snapshot.py", "if version is not None and version", "if version", SNAPSHOT),
    Bug(
        f"{NETWORK}/snapshot.py",
        "bool((_bits(now) == _bits(before)).all())",
        "torch.equal(now, before)",
        SNAPSHOT,
    ),
    Bug(
        f"{NETWORK}/tracing.py",
        "for path, module in self.modules.items():\n            names",
        "for path, module in ():\n            names",
        SNAPSHOT,
    ),
    Bug(
        f"{NETWORK}/tracing.py",
        'names = [str(node.target) for node in self.graph.nodes if node.op == "get_attr"]',
        "names = []",
        SNAPSHOT,
    ),
    # ---- states of the whole process
    Bug(
        f"{NETWORK}/modes.py",
        "        torch.random.fork_rng(devices=devices),\n",
        "",
        "tests/network/test_modes.py",
    ),
    Bug(
        f"{NETWORK}/modes.py",
        "with LOCK, sdpa_kernel(SDPBackend.MATH):",
        "with LOCK:",
        f"tests/network/test_modes.py {THREADS}",
    ),
    Bug(
        f"{NETWORK}/modes.py",
        "with LOCK, sdpa_kernel(SDPBackend.MATH):",
        "with sdpa_kernel(SDPBackend.MATH):",
        THREADS,
    ),
    Bug(
        f"{NETWORK}/tracing.py",
        "with LOCK, torch.enable_grad(), _autocast",
        "with torch.enable_grad(), _autocast",
        THREADS,
    ),
    Bug(
        f"{NETWORK}/tracing.py",
        "        if threading.get_ident() != self.thread:\n            return forward(*args, **kwargs)\n",
        "",
        THREADS,
    ),
    Bug(
        "llqr_mf/rules/generic.py",
        "self._within = call.within or nullcontext",
        "self._within = nullcontext",
        THREADS,
    ),
    # ---- users' code
    Bug(
        f"{NETWORK}/checks.py",
        "    return tuple(tree_map_only(Tensor, torch.clone, inputs))",
        "    return inputs",
        USER,
    ),
    Bug(
        f"{NETWORK}/checks.py",
        "with torch.enable_grad(), curvature_pass(device, stateful",
        "with torch.no_grad(), curvature_pass(device, stateful",
        USER,
    ),
    Bug(
        "llqr_mf/rules/base.py",
        "with torch.enable_grad():\n                result",
        "with torch.no_grad():\n                result",
        USER,
    ),
    Bug(
        "llqr_mf/rules/generic.py",
        "slot.value.data.requires_grad_()",
        "slot.value.detach().requires_grad_()",
        USER,
    ),
    Bug(
        f"{NETWORK}/linearize.py",
        "        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))\n        return function",
        "        return function",
        USER,
    ),
    Bug(
        "llqr_mf/optimizer/own_pass.py", "with torch.enable_grad():", "with torch.no_grad():", USER
    ),
    Bug("llqr_mf/optimizer/own_pass.py", "self.model(*copies(batch))", "self.model(*batch)", USER),
    # ---- the model is still the one that was split
    Bug(f"{NETWORK}/kept_layers.py", "            self.layers = self._split()\n", "", KEPT),
    Bug(
        f"{NETWORK}/checks.py",
        "{torch.float64: 1e5, torch.float32: 1e3}.get(b.dtype, 16.0)",
        "1e3",
        KEPT,
    ),
    Bug(f"{NETWORK}/checks.py", "tolerance * size.max()", "tolerance * (1 + size.max())", KEPT),
    Bug(
        "llqr_mf/from_network.py", "if run is not None and run.succeeded:", "if run is None:", KEPT
    ),
    Bug("llqr_mf/optimizer/llqr.py", "chain([True], repeat(False))", "repeat(False)", KEPT),
    Bug("llqr_mf/optimizer/llqr.py", "chain([True], repeat(False))", "repeat(True)", KEPT),
    Bug("llqr_mf/optimizer/own_pass.py", "self._passes % min(SHARE, samples)", "0", KEPT),
    Bug("llqr_mf/optimizer/own_pass.py", "        self._before.restore()", "        pass", KEPT),
    Bug(
        "llqr_mf/optimizer/own_pass.py",
        "if modes != self._modes:",
        "if not self._modes:",
        f"{KEPT} tests/optimizer/test_subspace.py",
    ),
    Bug(
        "llqr_mf/optimizer/subspace_step.py",
        "            self._own_pass.undo()\n            problem = make(True)",
        "            problem = make(True)",
        f"{KEPT} tests/optimizer",
    ),
    Bug(
        "llqr_mf/gaussian_process/tangent_kernel.py",
        "and self._network.agrees(x1, kept.outputs)",
        "",
        KEPT,
    ),
    Bug("llqr_mf/streamed.py", "looks = check or count", "looks = check and count", KEPT),
    Bug(
        "llqr_mf/probe/sharpness.py",
        "self._kept.use(\n            lambda it: LQRProblem",
        "(lambda f: f(self._kept.layers))(\n            lambda it: LQRProblem",
        KEPT,
    ),
    # ---- calls
    Bug(
        f"{NETWORK}/stage.py",
        "live = {i for i in live if last[i] >= t}",
        "live = {i for i in live if last[i] > t}",
        "tests/network/test_chain.py",
    ),
    Bug(
        f"{NETWORK}/tracing.py",
        "return bool(above) and all(map(is_inert, above))",
        "return bool(above) and any(map(is_inert, above))",
        "tests/network/test_split.py",
    ),
    Bug(
        "llqr_mf/rules/structural.py",
        "zeros = [value.new_zeros(()).expand",
        "zeros = [value.new_zeros(1).expand",
        "tests/rules/test_structural.py",
    ),
    *(
        Bug(f"{NETWORK}/inplace.py", f'"{view}"', f'"no_{view}"', VIEWS)
        for view in (
            "broadcast_to",
            "unfold",
            "adjoint",
            "expand_as",
            "narrow",
            "positive",
            "type_as",
        )
    ),
    Bug(
        f"{NETWORK}/inplace.py",
        "waiting.extend(filter(_is_view, view.users))",
        "pass",
        "tests/network",
    ),
    Bug(f"{NETWORK}/plain.py", "if tensor.is_meta:", "if False:", PLAIN),
    Bug(f"{NETWORK}/plain.py", 'if "FSDPModule" in kinds:', "if False:", PLAIN),
    # ---- what is saved
    Bug(
        "llqr_mf/errors.py",
        "raise TypeError(self._remedy)",
        "return object.__reduce_ex__(self, protocol)",
        "tests/test_saved.py",
    ),
    Bug(
        "llqr_mf/metrics/state_costs.py",
        "return partial(StateCosts, base=self.base), (dict(self.costs),)",
        "return StateCosts, (dict(self.costs),)",
        "tests/test_saved.py",
    ),
]


def is_seen(bug: Bug) -> bool:
    """Whether a test fails with the bug in place."""
    path = ROOT / bug.file
    text = path.read_text()
    if text.count(bug.right) < 1:
        raise SystemExit(f"{bug.file} no longer holds {bug.right!r}: mend the list.")
    path.write_text(text.replace(bug.right, bug.wrong, 1))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [*command, *bug.tests.split()], cwd=ROOT, capture_output=True, check=False
        )
    finally:
        path.write_text(text)
    return run.returncode == 1


def main() -> None:
    """Prints every bug and whether it was seen; fails if one was not."""
    words = sys.argv[1:]
    chosen = [bug for bug in BUGS if all(word in bug.file + bug.right for word in words)]
    unseen = 0
    for bug in chosen:
        seen = is_seen(bug)
        unseen += not seen
        line = bug.wrong.strip().splitlines() or ["(left out)"]
        print(f"{'seen  ' if seen else 'UNSEEN'} {bug.file}: {line[0]}", flush=True)
    print(f"{len(chosen) - unseen} of {len(chosen)} seen")
    raise SystemExit(unseen > 0)


if __name__ == "__main__":
    main()
