"""Optimisers over the groups that a stage trains: torch's own, or torchao's where moments are in eight bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.recipe import AdamW, Muon, Optimizer
from mllm.tune import Group


def build_optimizers(
    groups: Sequence[Group], parameters: Mapping[str, nn.Parameter], matrices: set[str], how: Optimizer
) -> list[torch.optim.Optimizer]:
    """One optimiser, or two where `how` treats matrices within layers (`matrices`, by name) in a way of their own.

    `parameters` are those that an engine steps, by the names in `groups`. Each group of the optimisers keeps its greatest
    rate as "peak".
    """

    def options(wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
        rows = []
        for group in groups:
            mine = [parameters[name] for name in group.names if wanted(name)]
            rows.append({"params": mine, "lr": group.lr, "peak": group.lr, "weight_decay": group.weight_decay})
        return [row for row in rows if row["params"]]

    def everything(_: str) -> bool:
        return True

    match how:
        case AdamW(bits=32):
            return [torch.optim.AdamW(options(everything), betas=how.betas, eps=how.eps, fused=True)]
        case AdamW():
            from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports] -- an extra

            return [AdamW8bit(options(everything), betas=how.betas, eps=how.eps)]
        case Muon():
            inner, others = options(lambda name: name in matrices), options(lambda name: name not in matrices)
            found: list[torch.optim.Optimizer] = []
            if inner:
                # 0.2 * sqrt(the longer side): steps as long as AdamW's, so that the same rate serves both.
                found.append(torch.optim.Muon(inner, momentum=how.momentum, adjust_lr_fn="match_rms_adamw"))
            if others:
                found.append(torch.optim.AdamW(others, betas=how.betas, eps=how.eps, fused=True))
            return found


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Let an optimiser's group step by `rate`. torchao keeps rates in tensors, and refuses a number in their place."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
