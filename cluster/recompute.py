"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mllm.recipe import Recompute

WRAPPED = "_checkpoint_wrapped_module."
"""What it puts into parameters' names."""

KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
"""What selective recomputing keeps: products of matrices cost most to compute again."""

ATTENTION = ("scaled_dot_product", "flash_attn", "flex_attention", "varlen_attn")


def _keeps(_: object, op: Any, *__: object, **___: object) -> CheckpointPolicy:
    kept = op in KEPT or any(word in str(op) for word in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(model: nn.Module, unit: nn.Module, how: Recompute) -> None:
    """Wrap `unit` in place so that its activations, or some, are computed again in the backward pass."""
    more: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _keeps)}
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is unit and not isinstance(parent, CheckpointWrapper):
                setattr(
                    parent,
                    name,
                    checkpoint_wrapper(
                        unit, checkpoint_fn=checkpoint, use_reentrant=False, **(more if how == "selective" else {})
                    ),
                )
                return


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the model's own names, whatever it has been wrapped in."""
    return {name.replace(WRAPPED, ""): parameter for name, parameter in model.named_parameters()}
