"""What a stage trains: freeze everything, then open the named parts with their learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from mllm.recipe import Full
from mllm.vlm import VisionLanguageModel
from pipelines.types import spec


@dataclass(slots=True)
class Group:
    """Parameters that share a learning rate and a weight decay; `names` are the model's own, in the same order."""

    part: str
    lr: float
    weight_decay: float
    names: tuple[str, ...]
    parameters: list[nn.Parameter]


def apply_tuning(model: VisionLanguageModel, tune: Mapping[str, Full]) -> list[Group]:
    """Set `requires_grad` on all parameters and return the trained groups, each parameter in the most exact one.

    Raises ValueError for a part that the model does not have, naming those it has.
    """
    parts = model.parts()
    check_parts(list(parts), tune)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for part in sorted(tune, key=lambda name: -name.count(".")):
        mine = [p for p in parts[part] if id(p) in named]
        names = tuple(named.pop(id(p)) for p in mine)
        for parameter in mine:
            parameter.requires_grad_(True)
        groups.append(Group(part, tune[part].lr, tune[part].weight_decay, names, mine))
    return sorted(groups, key=lambda group: list(parts).index(group.part))


def check_parts(parts: list[str], tune: Mapping[str, Full]) -> None:
    """Raise ValueError when `tune` names a part that is none of `parts`."""
    for name in tune:
        if name not in parts:
            near = get_close_matches(name, parts, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"tune: the model has no part {name!r}{hint} Its parts are {parts}")


@spec
class PartReport:
    """One line of the trained/frozen table."""

    part: str
    trained: int
    frozen: int
    lr: float | None

    def line(self) -> str:
        state = f"trained at lr {self.lr:g}" if self.lr is not None else "frozen"
        return f"{self.part:<10} {self.trained + self.frozen:>15,} parameters, {state}"


def describe(model: VisionLanguageModel, tune: Mapping[str, Full]) -> list[PartReport]:
    """The model's main parts, with what is trained and what is frozen. Call it after `apply_tuning`."""
    reports = []
    for name, module in (("encoder", model.encoder), ("connector", model.connector), ("lm", model.lm)):
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
        rates = [how.lr for part, how in tune.items() if part.split(".")[0] == name]
        reports.append(PartReport(part=name, trained=trained, frozen=frozen, lr=max(rates) if rates else None))
    return reports
