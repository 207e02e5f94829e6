"""A model for weights that come from elsewhere is the one that would be built, but for its weights."""

import json

import psutil
import pytest
import torch
from torch import nn

from mllm.recipe import dump
from mllm.recipes import RECIPES, by_name
from mllm.tiny import tiny
from tests.structures import structure

MODELS = {json.dumps(structure(json.loads(dump(tiny(by_name(name))))["model"])): name for name in reversed([*RECIPES])}


def tied(module: nn.Module) -> list[list[str]]:
    """Names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [*names.values()]


@pytest.mark.parametrize("name", sorted(MODELS.values()))
def test_an_empty_model_differs_from_a_built_one_in_its_weights_alone(name: str) -> None:
    spec = tiny(by_name(name)).model
    torch.manual_seed(0)
    built, empty = spec.build(), spec.empty()
    assert tied(empty) == tied(built)
    ours, theirs = dict(empty.named_parameters()), dict(built.named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    learned = set(built.state_dict())
    for (buffer, one), other in zip(empty.named_buffers(), built.buffers(), strict=True):
        assert one.shape == other.shape
        assert buffer in learned or torch.equal(one, other), buffer  # what no checkpoint holds is there


def test_an_empty_model_takes_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    model = by_name("vila_15_3b").model.empty()
    size = sum(4 * p.numel() for p in model.parameters())
    assert psutil.Process().memory_info().rss - before < 0.05 * size
