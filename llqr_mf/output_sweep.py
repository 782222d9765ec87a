"""Curvature at the output, pulled back call by call to where the parameters are read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .network.linearize import BoundNode, Forgotten
from .operators.output_curvature import OutputCurvature
from .operators.tangent import add
from .origin import NetworkOrigin
from .problem import LQRProblem

PASS = 16
"""Output columns made at a time."""

PROBED_ELEMENTS = 2**22
"""Numbers of a call's input or output that are probed at a time."""


@dataclass(frozen=True)
class Read:
    """One argument of a call that is a parameter.

    Args:
        bound: The call.
        index: Which of its inputs.
    """

    bound: BoundNode
    index: int

    @property
    def role(self) -> str | None:
        """What the parameter is there: "weight", "bias", or None where the rule has no names."""
        roles: list[str] | None = getattr(self.bound.node, "roles", None)
        return None if roles is None else roles[self.index]


def calls(problem: LQRProblem) -> Iterator[BoundNode]:
    """The linearised calls of a network's problem, first to last.

    Raises:
        ValueError: The problem was made with checkpoints, and keeps none of them.
    """
    assert problem.origin is not None
    if problem.origin.linearization.remakes:
        raise Forgotten.error()
    return (bound for nodes in problem.origin.linearization.layers for bound in nodes)


def parameter_reads(problem: LQRProblem) -> dict[str, list[Read]]:
    """Every read of every parameter, by its name; empty for one that nothing reads."""
    reads: dict[str, list[Read]] = {name: [] for name in problem.names}
    for bound in calls(problem):
        for index, i in enumerate(bound.inputs):
            if i < len(problem.names):
                reads[problem.names[i]].append(Read(bound, index))
    return reads


# ---- columns of the factor


def terminal_factor(problem: LQRProblem) -> OutputCurvature | None:
    """Q_T where it is the only cost and has a factor."""
    system = problem.system
    costs = system.state_costs[-1]
    if system.curved or len(costs) != 1 or costs[0].component is not None:
        return None
    curvature = costs[0].operator
    if not isinstance(curvature, OutputCurvature) or curvature.rank is None:
        return None
    return curvature


def required_factor(problem: LQRProblem, what: str) -> OutputCurvature:
    """`terminal_factor` of a network's problem.

    Args:
        problem: The problem.
        what: Who needs it, in the plural, for the message.

    Raises:
        ValueError: The terminal cost has no factor or is not the only one, or there is no network.
    """
    factor = terminal_factor(problem)
    if factor is None or problem.origin is None:
        reasons = [c.operator for c in problem.system.state_costs[-1]]
        why = [r for o in reasons if (r := getattr(o, "unfactored", None))]
        raise ValueError(
            f"{what} need a network's problem whose only cost is at the output, with a known factor"
            f"{f' ({why[0]})' if why else ''}: use metric='gauss_newton' or 'fisher' with a "
            "built-in loss, or with a function that is a mean of terms of single samples."
        )
    return factor


def factor_columns(factor: OutputCurvature, per_pass: int = PASS) -> Iterator[Tensor]:
    """All columns of every sample's factor, a few at a time: (c, N, D) until r are done."""
    assert factor.rank is not None
    for start in range(0, factor.rank, per_pass):
        yield factor.factor_columns(start, min(start + per_pass, factor.rank))


def signed_columns(
    factor: OutputCurvature, count: int, generator: torch.Generator, per_pass: int = PASS
) -> Iterator[Tensor]:
    """L z with `count` draws of random signs z, a few at a time: (c, N, D).

    Every sample has its own signs, so E[(L z)(L z)'] = Q_T.
    """
    shape = (factor.rank or 0, factor.samples)
    for start in range(0, count, per_pass):
        # One draw after another, so that the numbers do not depend on `per_pass`.
        bits = [
            torch.randint(0, 2, shape, generator=generator, device=factor.device)
            for _ in range(start, min(start + per_pass, count))
        ]
        rows = factor.factor((2 * torch.stack(bits) - 1).to(factor.dtype))
        yield rows.reshape(len(bits), factor.samples, factor.width)


def output_columns(
    problem: LQRProblem,
    factor: OutputCurvature,
    samples: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Columns whose outer products add up to Q_T, a few at a time: (c, *output).

    Args:
        problem: From a network.
        factor: L of its output.
        samples: None for the columns of L, of every sample; k for k draws L z / sqrt(k) with random
            signs z, which add up to Q_T in expectation.
        generator: Of the signs, on the problem's device; None takes one of seed 0.

    Raises:
        ValueError: `samples` is less than 1.
    """
    assert problem.origin is not None
    shape, per_pass = problem.origin.outputs.shape, problem._columns or PASS
    if samples is None:
        columns = factor_columns(factor, per_pass)
    elif samples < 1:
        raise ValueError(f"samples is {samples}: give a number of draws, or None for all columns.")
    else:
        source = seeded(problem, generator)
        columns = (c / samples**0.5 for c in signed_columns(factor, samples, source, per_pass))
    for part in columns:
        yield part.reshape(len(part), *shape)


def seeded(problem: LQRProblem, generator: torch.Generator | None) -> torch.Generator:
    """The generator given, or one of seed 0 on the problem's device."""
    return torch.Generator(problem.device).manual_seed(0) if generator is None else generator


# ---- the sweep


def pull_back(
    problem: LQRProblem, cotangents: Tensor, wanted: Collection[int] | None = None
) -> Iterator[tuple[BoundNode, list[Tensor | None]]]:
    """Pulls rows of cotangents of the output back through the network, last call first.

    Cotangents of activations are summed where they meet and dropped once they are used. Those of
    the parameters are left to the caller, who has the call and what arrived at its outputs.

    Args:
        problem: From a network.
        cotangents: Of the output, shape (c, *output).
        wanted: `id` of the calls that the caller is after, by default all that read a parameter.
            Nothing is pulled further than to these.

    Yields:
        A wanted call and the cotangents of its outputs, (c, *shape); None is zero. Calls that
        nothing arrives at are left out.

    Raises:
        RuntimeError: The weights or the batch were written to since.
    """
    assert problem.origin is not None
    # As the sweeps over the stages do.
    if not torch.compiler.is_compiling():
        problem.system.check()
    linearization = problem.origin.linearization
    parameters = len(problem.names)
    if wanted is None:
        wanted = {id(bound) for bound in calls(problem) if min(bound.inputs) < parameters}
    leads: set[int] = set()
    for bound in calls(problem):
        if id(bound) in wanted or leads & set(bound.inputs):
            leads.update(bound.outputs)
    sums: dict[int, Tensor] = {linearization.output: cotangents}
    for bound in reversed(list(calls(problem))):
        arrived = [sums.pop(i, None) for i in bound.outputs]
        if all(c is None for c in arrived):
            continue
        if id(bound) in wanted:
            yield bound, arrived
        needed = [i in leads for i in bound.inputs]
        if not any(needed):
            continue
        pulled = bound.node.pull_all(arrived, needed, [None] * len(needed))
        for i, piece in zip(bound.inputs, pulled, strict=True):
            total = add(sums.get(i), piece)
            if total is not None:
                sums[i] = total


def add_controls(
    problem: LQRProblem, costate: Tensor, targets: Sequence[Tensor], scales: Sequence[float]
) -> None:
    """Adds scale_i * (J' p)_i to the i-th target, in place: nothing of the controls' size is made.

    Args:
        problem: From a network.
        costate: p, a row (1, n_T).
        targets: One tensor per parameter, in their shapes; may be the parameters themselves.
        scales: A factor for each.

    Raises:
        ValueError: A cotangent is not finite. No target has been changed by then.
    """
    assert problem.origin is not None
    # All cotangents first: a weight that has moved would pull back another costate.
    pulled = list(pull_back(problem, costate.reshape(1, *problem.origin.outputs.shape)))
    for _, cotangents in pulled:
        if not all(c is None or bool(torch.isfinite(c).all()) for c in cotangents):
            raise ValueError("the step has entries that are NaN or infinite: it was not applied.")
    storages = {target.untyped_storage().data_ptr() for target in targets}
    in_place, formed = [], []
    for bound, cotangents in pulled:
        for index, i in enumerate(bound.inputs):
            if i < len(targets) and bound.node.reads_none_of(storages):
                in_place.append((bound.node, cotangents, index, i))
            elif i < len(targets):
                # A product of two parameters reads one to pull back to the other.
                part = torch.zeros_like(targets[i])
                bound.node.add_pulled(cotangents, index, part, scales[i])
                formed.append((i, part))
    for node, cotangents, index, i in in_place:
        node.add_pulled(cotangents, index, targets[i], scales[i])
    for i, part in formed:
        targets[i].add_(part)


# ---- samples


_MIXED: WeakKeyDictionary[NetworkOrigin, frozenset[int]] = WeakKeyDictionary()
"""What was found of a linearisation: to probe calls without a rule costs some products."""


def mixed_values(problem: LQRProblem) -> frozenset[int]:
    """Values of parameters that reach the output, and not row n of them the n-th output alone.

    At all others a cotangent of the output that is zero but for sample n is zero but for row n:
    one column per sample can be pulled back to them for all samples at once.
    """
    assert problem.origin is not None
    if problem.origin not in _MIXED:
        _MIXED[problem.origin] = frozenset(_find_mixed(problem))
    return _MIXED[problem.origin]


def _find_mixed(problem: LQRProblem) -> set[int]:
    assert problem.origin is not None
    linearization, samples = problem.origin.linearization, len(problem.origin.outputs)
    of_batch, moving = set(linearization.inputs), set(range(len(problem.names)))
    for bound in calls(problem):
        if bound.node.per_sample or of_batch & set(bound.inputs):
            of_batch.update(bound.outputs)
        if moving & set(bound.inputs):
            moving.update(bound.outputs)
    batched = {i for i in of_batch if linearization.shapes[i][:1] == (samples,)}
    reached = {linearization.output}
    mixed = reached - batched
    for bound in reversed(list(calls(problem))):
        live = [o in reached for o in bound.outputs]
        if not any(live):
            continue
        spoilt = bool(mixed & set(bound.outputs))
        for index, i in enumerate(bound.inputs):
            # Nothing is pulled further back than to a parameter.
            if i < len(problem.names) or i not in moving:
                continue
            reached.add(i)
            if spoilt or i not in batched or not _keeps_rows(problem, bound, index, live):
                mixed.add(i)
    return mixed


def samples_are_apart(problem: LQRProblem) -> bool:
    """Whether a column pulled back for all samples at once gives every sample's own gradient.

    It doesn't where a call between a parameter and the output mixes samples, or a parameter is
    read twice, by a call of several outputs, or changed before it meets the batch.
    """
    mixed = mixed_values(problem)
    return all(
        len(reads) <= 1
        and all(len(r.bound.outputs) == 1 and r.bound.outputs[0] not in mixed for r in reads)
        for reads in parameter_reads(problem).values()
    )


def _keeps_rows(problem: LQRProblem, bound: BoundNode, index: int, live: list[bool]) -> bool:
    """Whether row n of one input moves row n of the outputs that count, and no other row.

    Rules say so of themselves; any other call is probed: rows that do not move must stay.
    """
    assert problem.origin is not None
    shapes, samples = problem.origin.linearization.shapes, len(problem.origin.outputs)
    outputs = [o for o, counts in zip(bound.outputs, live, strict=True) if counts]
    if any(shapes[o][:1] != (samples,) for o in outputs):
        return False
    # Rules answer for their data, not for a weight that was computed from it.
    if bound.node.couples_batch is not None and Read(bound, index).role in (None, "x"):
        return not bound.node.couples_batch
    if samples == 1:
        return True
    shape, proto = shapes[bound.inputs[index]], problem.system.proto
    is_complex = bound.inputs[index] in problem.origin.linearization.complex_values
    generator = torch.Generator().manual_seed(0)
    # Random, so that what several rows do to another does not cancel.
    dtype = torch.complex64 if is_complex else torch.float32
    drawn = torch.randn(1, *shape, generator=generator, dtype=dtype)
    largest = max(math.prod(shapes[i]) for i in (bound.inputs[index], *outputs))
    for moves in subsets_that_separate(samples).split(max(1, PROBED_ELEMENTS // largest)):
        moved = drawn.repeat(len(moves), *[1] * len(shape))
        moved[~moves] = 0
        tangents: list[Tensor | None] = [None] * len(bound.inputs)
        tangents[index] = moved.to(
            proto.device, proto.dtype.to_complex() if is_complex else proto.dtype
        )
        with torch.no_grad():
            results = bound.node.push_all(tangents)
        stays = ~moves.to(proto.device)
        if any(
            y is not None and counts and bool(y[stays].any())
            for y, counts in zip(results, live, strict=True)
        ):
            return False
    return True


def subsets_that_separate(samples: int) -> Tensor:
    """Subsets of the samples, as few as possible: for any n and m, one has n and not m.

    Sample n is in those of its own choice of half of the k subsets, and no choice holds another
    (Sperner 1928): binomial(k, k / 2) samples need k subsets.

    Returns:
        Rows of booleans, shape (k, samples).
    """
    count = 0
    while math.comb(count, count // 2) < samples:
        count += 1
    choices = itertools.combinations(range(count), count // 2)
    chosen = torch.zeros(count, samples, dtype=torch.bool)
    for n, choice in enumerate(itertools.islice(choices, samples)):
        chosen[list(choice), n] = True
    return chosen
