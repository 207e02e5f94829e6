"""What a stage trains: freeze everything, then open what it names, each part with its own rate.

A key of `Stage.tune` is one of the model's parts (`lm`, `lm.embeddings`, ...) or a pattern over its parameters' names
(`encoder.*.layers.2?.*`). The most exact word counts: a pattern before a part, a part within a part before that, and of two
patterns the later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from mllm.model import Model
from mllm.parts import PartReport
from mllm.recipe import Frozen, Full, LoRA, Tuning
from mllm.vlm import VisionLanguageModel


@dataclass(slots=True)
class Group:
    """Parameters that share a learning rate and a weight decay; `names` are the model's own, in the same order."""

    part: str
    lr: float
    weight_decay: float
    names: tuple[str, ...]
    parameters: list[nn.Parameter]


def apply_tuning(model: Model, tune: Mapping[str, Tuning]) -> list[Group]:
    """Add adapters, set `requires_grad` on all parameters and return the trained groups, each parameter in one of them.

    Raises ValueError for a part that the model does not have, naming those it has, and for a pattern that matches nothing.
    """
    chosen = _chosen(model, tune)
    for key, how in tune.items():
        if isinstance(how, LoRA):
            _adapt(model, key, how, {id(p) for p in chosen[key].values()})
    if any(isinstance(how, LoRA) for how in tune.values()):
        _activate(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    named = dict(model.named_parameters())
    groups = []
    for key, how in tune.items():
        match how:
            case Full(first_row=row):
                mine = {id(p) for p in chosen[key].values()}
                parameters = {name: p for name, p in named.items() if id(p) in mine}
                if row:
                    _first_row(model, key, row, parameters)
                for scale, names in _by_depth(list(parameters), how.layer_decay).items():
                    groups.append(_group(key, how.lr * scale, how.weight_decay, names, named))
            case LoRA():
                names = [name for name in named if ADAPTER.search(name) and f".{_adapter(key)}" in name]
                groups.append(_group(key, how.lr, how.weight_decay, names, named))
            case Frozen():
                pass
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
    return [group for group in groups if group.names]


def add_adapters(model: Model, tune: Mapping[str, Tuning]) -> bool:
    """Give `model` the adapters that a stage with `tune` trains, so that its checkpoint fits; whether there are any."""
    if not any(isinstance(how, LoRA) for how in tune.values()):
        return False
    apply_tuning(model, tune)
    return True


def merge_adapters(model: Model) -> None:
    """Add each adapter to the weights it belongs to and take it away; what the model computes stays the same."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())


def check_parts(parts: list[str], tune: Mapping[str, Tuning]) -> None:
    """Raise ValueError when `tune` names a part that is none of `parts`; patterns are not looked at."""
    for name in tune:
        if name not in parts and not _is_pattern(name):
            near = get_close_matches(name, parts, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"tune: the model has no part {name!r}{hint} Its parts are {parts}")


def peak_rate(tune: Mapping[str, Tuning]) -> float:
    """The greatest learning rate of a stage."""
    return max(how.lr for how in tune.values() if not isinstance(how, Frozen))


def _is_pattern(key: str) -> bool:
    return any(sign in key for sign in "*?[")


def _chosen(model: Model, tune: Mapping[str, Tuning]) -> dict[str, dict[str, nn.Parameter]]:
    """Each key's parameters by name: those for which it is the most exact word."""
    parts = model.parts()
    check_parts(list(parts), tune)
    free = dict(model.named_parameters())
    patterns = [key for key in tune if _is_pattern(key)]
    chosen: dict[str, dict[str, nn.Parameter]] = {}
    for key in [*reversed(patterns), *sorted(set(tune) - set(patterns), key=lambda name: -name.count("."))]:
        inside = {id(p) for p in parts.get(key, [])}
        mine = {name: p for name, p in free.items() if (fnmatchcase(name, key) if key in patterns else id(p) in inside)}
        if key in patterns and not mine:
            near = get_close_matches(key, [name for name, _ in model.named_parameters()], 1, 0)
            raise ValueError(f"tune: no parameter's name matches {key!r} that is not another key's; one is {near[0]!r}")
        free = {name: p for name, p in free.items() if name not in mine}
        chosen[key] = mine
    return chosen


def _group(key: str, lr: float, weight_decay: float, names: list[str], named: Mapping[str, nn.Parameter]) -> Group:
    return Group(key, lr, weight_decay, tuple(names), [named[name] for name in names])


ADAPTER = re.compile(r"\.lora_(A|B|magnitude_vector)\.")


def _adapter(key: str) -> str:
    """The adapter's name: peft keeps adapters in modules, whose names hold no points."""
    return re.sub(r"\W", "_", key)


def _adapt(model: Model, key: str, how: LoRA, inside: set[int]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    # The objective takes the head's matrix, and would never see an adapter.
    head = id(model.lm.model.lm_head) if isinstance(model, VisionLanguageModel) else None
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in inside and id(module) != head
        if not how.layers or name.rpartition(".")[2] in how.layers
    ]
    if not layers:
        raise ValueError(f"tune.{key}: LoRA finds no linear layer named {list(how.layers) or 'anything'} in it")
    config = LoraConfig(r=how.rank, lora_alpha=how.alpha, use_dora=how.dora, target_modules=layers, bias="none")
    inject_adapter_in_model(config, model, _adapter(key))
    del model.peft_config  # else the next part's adapters would be warned about


def _activate(model: Model) -> None:
    """Have every adapter at work: for peft only those of the last name that came are in use, and each part has its own."""
    from peft.tuners.lora.layer import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(module.lora_A))


def _first_row(model: Model, key: str, row: int, parameters: Mapping[str, nn.Parameter]) -> None:
    if not isinstance(model, VisionLanguageModel):
        raise ValueError(
            f"tune.{key}: first_row={row} is for a language model's embeddings and head, and there is none"
        )
    embedding, head = model.lm.embedding.weight, model.lm.head
    for name, parameter in parameters.items():
        if parameter is not embedding and parameter is not head:
            raise ValueError(
                f"tune.{key}: first_row={row} is for the language model's embeddings and head, not for {name}"
            )
        if row >= len(parameter):
            raise ValueError(f"tune.{key}: first_row={row}, and {name} has only {len(parameter)} rows")
        if parameter is embedding:
            model.lm.first_embedded = row
        if parameter is head:
            model.lm.first_predicted = row


LAYER = re.compile(r"\blayers?\.(\d+)\.")


def _by_depth(names: list[str], decay: float) -> dict[float, list[str]]:
    """Names by the factor of their rate: 1 from the last layer on, `decay` less for each layer before."""
    if decay == 1:
        return {1.0: names}
    depths = {name: int(found.group(1)) + 1 for name in names if (found := LAYER.search(name))}
    if not depths:
        raise ValueError(f"layer_decay={decay} needs numbered layers, and there are none among {names[:3]} ...")
    last, seen = max(depths.values()), False
    factors: dict[float, list[str]] = {}
    for name in names:
        seen = seen or name in depths
        depth = depths.get(
            name, last if seen else 0
        )  # what comes before the layers is deepest, what comes after is the top
        factors.setdefault(decay ** (last - depth), []).append(name)
    return factors


def describe(model: Model, tune: Mapping[str, Tuning]) -> list[PartReport]:
    """The model's main parts, with what is trained and what is frozen. Call it after `apply_tuning`."""
    reports = []
    for name, parameters in model.main().items():
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        mine = {key: how for key, how in tune.items() if key.split(".")[0] == name and not isinstance(how, Frozen)}
        reports.append(PartReport(part=name, trained=trained, frozen=frozen, lr=peak_rate(mine) if mine else None))
    return reports
