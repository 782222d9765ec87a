"""Labelled sentences without a download: docstrings of Python's standard library, by topic."""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TOPICS = {
    "numbers": "math cmath decimal fractions statistics random",
    "mail": "email.message email.utils email.header email.generator email.parser email.charset "
    "email.policy mailbox smtplib imaplib poplib",
    "concurrency": "asyncio threading concurrent.futures queue multiprocessing.pool "
    "multiprocessing.queues multiprocessing.managers",
    "files": "os posixpath shutil pathlib tempfile glob zipfile tarfile gzip filecmp",
    "tests": "unittest.case unittest.mock unittest.loader unittest.runner unittest.result "
    "unittest.suite doctest",
    "network": "socket ssl socketserver http.client http.server http.cookiejar urllib.request "
    "urllib.parse urllib.robotparser ipaddress",
}
"""Modules whose docstrings belong to a topic."""


def sentences(count: int, *, seed: int = 0) -> tuple[list[str], Tensor]:
    """First sentences of docstrings, as many of every topic, in random order, with their topics.

    Args:
        count: How many; rounded down to a multiple of the number of topics.
        seed: Of the choice.

    Raises:
        ValueError: A topic has no sentence left, or `count` is less than the number of topics.
    """
    if count < len(TOPICS):
        raise ValueError(f"{count} sentences of {len(TOPICS)} topics: give at least one each.")
    chooser = random.Random(seed)
    seen: set[str] = set()
    pairs: list[tuple[str, int]] = []
    for label, (topic, modules) in enumerate(TOPICS.items()):
        found = sorted({s for name in modules.split() for s in _of_module(name)} - seen)
        seen.update(found)
        each = count // len(TOPICS)
        if len(found) < each:
            raise ValueError(
                f"topic {topic!r} has {len(found)} sentences and {each} are wanted: "
                f"{len(found) * len(TOPICS)} sentences are the most."
            )
        pairs += [(s, label) for s in chooser.sample(found, each)]
    chooser.shuffle(pairs)
    return [s for s, _ in pairs], torch.tensor([label for _, label in pairs])


def _of_module(name: str) -> Iterator[str]:
    """Of its functions, its classes and their public methods."""
    module = importlib.import_module(name)
    homes = (name.split(".")[0], "posix", "nt")
    for member in vars(module).values():
        home = (getattr(member, "__module__", None) or "").lstrip("_").split(".")[0]
        if home not in homes or not (inspect.isroutine(member) or inspect.isclass(member)):
            continue
        yield from _first_sentence(member)
        if inspect.isclass(member):
            for attribute, inner in vars(member).items():
                if not attribute.startswith("_") and inspect.isroutine(inner):
                    yield from _first_sentence(inner)


def _first_sentence(member: Any) -> Iterator[str]:
    """The first sentence of the docstring, if there is one of 5 to 30 words."""
    text = inspect.cleandoc(getattr(member, "__doc__", None) or "").split("\n\n")[0]
    found = re.match(r"[A-Z].*?[a-z)]\.(?=\s|$)", " ".join(text.split()))
    if found and 5 <= len(found[0].split()) <= 30:
        yield found[0]
