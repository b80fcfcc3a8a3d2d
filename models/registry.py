"""From the `[model]` section to a module, for the built-in family and for a user's own factory.

A factory is called as `factory(vocab_size=..., **fields)` (and `kernels=...` where it takes that) with the
keys of the section, and returns a module with `forward(tokens, *, positions, document_ids) -> logits [B, S,
V]` (all inputs [B, S]). Members of its `nn.ModuleList`s are the units that are sharded and recomputed. A
module may say how its parameters start with `initial(name)` (see `parallel/initial.py`); without it, the
numbers its constructor draws are used, the same on every rank. How it splits beyond data parallelism it says
with `plan` (see `parallel/plan.py`).
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..kernels.config import AUTO, KernelsConfig
from ..parallel.limits import ModelLimits
from ..parallel.plan import ModelPlan, Role
from .llama import Llama
from .llama_config import LlamaConfig, LlamaShape


class ModelError(ValueError):
    """The configured model cannot be built."""


def llama_shape(config: LlamaConfig, vocab_size: int) -> LlamaShape:
    """The configured shape with the tokenizer's vocabulary filled in. Raises ModelError when the two
    disagree.
    """
    shape = config.shape()
    if shape.vocab_size == 0:
        return replace(shape, vocab_size=vocab_size)
    if shape.vocab_size < vocab_size:
        raise ModelError(
            f"model.vocab_size = {shape.vocab_size}, but the tokenizer has {vocab_size} tokens, so some "
            "would have no embedding: set model.vocab_size=0 to take the tokenizer's, or choose the "
            "tokenizer of these weights"
        )
    return shape


def load_factory(name: str, fields: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Import `package.module:factory` and check that it takes `vocab_size` and the given fields.

    Raises ModelError when it cannot be imported or called so.
    """
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ModelError(
            f'model.family = "{name}": {module_name} cannot be imported ({error}); put it beside the '
            "configuration file, in the working directory, or install it"
        ) from error
    except AttributeError:
        public = [key for key in vars(importlib.import_module(module_name)) if not key.startswith("_")]
        raise ModelError(
            f'model.family = "{name}": {module_name} has no {attribute}; it has {", ".join(public)}'
        ) from None
    try:
        inspect.signature(factory).bind(vocab_size=0, **_asked_for(factory, KernelsConfig()), **fields)
    except TypeError as error:
        if not callable(factory):
            raise ModelError(f'model.family = "{name}": {attribute} is no function or class') from None
        own = ("vocab_size", "kernels")
        takes = ", ".join(p for p in inspect.signature(factory).parameters if p not in own)
        raise ModelError(f'model.family = "{name}": {error}; beside vocab_size it takes: {takes}') from None
    return factory


def build_model(
    family: str,
    config: LlamaConfig | Mapping[str, Any],
    *,
    vocab_size: int,
    kernels: KernelsConfig = AUTO,
) -> nn.Module:
    """Build the module on the current default device; a Llama's parameters are left to `initial`.

    A user's own factory is given `kernels` where it takes an argument of that name.
    """
    if isinstance(config, LlamaConfig):
        return Llama(llama_shape(config, vocab_size), kernels)
    factory = load_factory(family, config)
    return factory(vocab_size=vocab_size, **_asked_for(factory, kernels), **config)


def limits_of(model: nn.Module, *, family: str, seq_len: int) -> ModelLimits | None:
    """What decides which layouts can be, of a model that is there; None where it has no plan."""
    if isinstance(model, Llama):
        return model.shape.limits(seq_len)
    plan: ModelPlan | None = getattr(model, "plan", None)
    if plan is None:
        return None
    able = {
        "tp": bool(plan.parameters),
        "cp": Role.ATTENTION in plan.modules.values(),
        "pp": plan.stages is not None,
    }
    return ModelLimits(
        family=family,
        layers=len(getattr(model, plan.stages.blocks)) if plan.stages is not None else None,
        seq_len=seq_len,
        axes=tuple(axis for axis, said in able.items() if said),
    )


def _asked_for(factory: Callable[..., nn.Module], kernels: KernelsConfig) -> dict[str, KernelsConfig]:
    return {"kernels": kernels} if "kernels" in inspect.signature(factory).parameters else {}
