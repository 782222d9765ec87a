"""M as `LLQR` was told to make it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..preconditioners.base import Structure
from ..preconditioners.blueprint import Blueprint
from ..preconditioners.direct_sum import Rules, rule_pairs
from ..preconditioners.direct_sum import structure as build_structure

_DEFAULTS: dict[str, Any] = {"max_state": 3.0, "max_turn": 640, "kernels": "tensor"}
"""Options of E-Kronecker by name: state within three times the weights, and M g cheap enough."""


def made_for(model: nn.Module, given: Rules | Structure, options: Mapping[str, Any]) -> Structure:
    """M for a model; by name, E-Kronecker holds three times the weights unless told otherwise."""
    if not isinstance(given, Structure):
        names = {name for _, name in rule_pairs(given)}
        defaults = _DEFAULTS if names & {"ekron", "ekronecker"} else {}
        return build_structure(model, given, **{**defaults, **options})
    if options:
        raise ValueError(f"{sorted(options)} are options of a structure given by name.")
    wanted = Blueprint.of(model)
    if given.layout != wanted.layout or given.device != wanted.proto.device:
        raise ValueError(
            "the structure was made for other parameters than the model's trainable ones, or on "
            "another device: make it with lq.EKronecker(model) or the like."
        )
    return given
