"""Plants bugs, one at a time, and runs the tests that should see each.

    python tests/planted_bugs.py            # all of planted_bugs.json: half an hour
    python tests/planted_bugs.py snapshot   # those whose file or line holds a word

A test must be able to fail: whoever adds one adds a bug that makes it to the list. The file is put
back after every run; do not edit it meanwhile.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Bug(NamedTuple):
    """What stands somewhere, what is put in its place, and the tests to run."""

    file: str
    right: str
    wrong: str
    tests: str


def is_seen(bug: Bug) -> bool:
    """Whether a test fails with the bug in place."""
    path = ROOT / bug.file
    text = path.read_text()
    if bug.right not in text:
        raise SystemExit(f"{bug.file} no longer holds {bug.right!r}: mend the list.")
    path.write_text(text.replace(bug.right, bug.wrong, 1))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += shlex.split(bug.tests)
        run = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    finally:
        path.write_text(text)
    return run.returncode == 1


def main() -> None:
    """Prints every bug and whether it was seen; fails if one was not."""
    words = sys.argv[1:]
    bugs = [Bug(**each) for each in json.loads((HERE / "planted_bugs.json").read_text())]
    chosen = [bug for bug in bugs if all(word in bug.file + bug.right for word in words)]
    unseen = 0
    for bug in chosen:
        seen = is_seen(bug)
        unseen += not seen
        first = (bug.wrong.strip().splitlines() or ["(left out)"])[0]
        print(f"{'seen  ' if seen else 'UNSEEN'} {bug.file}: {first}", flush=True)
    print(f"{len(chosen) - unseen} of {len(chosen)} seen")
    raise SystemExit(unseen > 0)


if __name__ == "__main__":
    main()
