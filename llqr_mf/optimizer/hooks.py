"""The hooks that torch lets users register on an optimizer, each run once a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer


def step_of_base(base: Optimizer) -> None:
    """The base's step, with its own hooks: those of all optimizers run for the step around it."""
    everywhere = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    inner = getattr(type(base).step, "__wrapped__", None)
    if inner is None or not any(everywhere):
        base.step()
        return
    # What torch wraps around every optimizer's step, without the hooks of all.
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    for before in base._optimizer_step_pre_hooks.values():
        args, kwargs = before(base, args, kwargs) or (args, kwargs)
    inner(base, *args, **kwargs)
    for after in base._optimizer_step_post_hooks.values():
        after(base, args, kwargs)


def before_state_dict(optimizer: Optimizer) -> None:
    """The hooks of `register_state_dict_pre_hook`."""
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)


def after_state_dict(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Those of `register_state_dict_post_hook`, which may give another state."""
    for hook in optimizer._optimizer_state_dict_post_hooks.values():
        made = hook(optimizer, state)
        state = state if made is None else made
    return state


def before_load(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `register_load_state_dict_pre_hook`, on a copy; they may give another state."""
    given = dict(state)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        made = hook(optimizer, given)
        given = given if made is None else dict(made)
    return given


def after_load(optimizer: Optimizer) -> None:
    """Those of `register_load_state_dict_post_hook`."""
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)
