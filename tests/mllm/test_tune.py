"""What a stage opens is trained, and nothing else; adapters become weights without changing a logit."""

import pytest
import torch
from torch import Tensor

from mllm.objectives import NextToken
from mllm.recipe import Frozen, Full, LoRA, Recipe, Tuning
from mllm.tune import Group, apply_tuning, describe, merge_adapters
from mllm.vlm import VisionLanguageModel
from pipelines.types import Batch
from pipelines.windows import PackWindows


@pytest.fixture
def model(recipe: Recipe) -> VisionLanguageModel:
    torch.manual_seed(0)
    return recipe.vlm.build()


@pytest.fixture
def batch(packs: PackWindows) -> Batch:
    return Batch.of(next(pack for pack in packs.packs(0) if len(pack.tiles)))


def step(model: VisionLanguageModel, batch: Batch, groups: list[Group]) -> None:
    options = [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    optimizer = torch.optim.AdamW(options)
    for _ in range(2):
        NextToken()(model, batch).sum.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: VisionLanguageModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch) @ model.lm.head.T


def rates(groups: list[Group]) -> dict[str, float]:
    return {name: group.lr for group in groups for name in group.names}


def test_a_part_that_the_model_lacks_is_refused_with_those_it_has(model: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match="no part 'conector'; did you mean 'connector'"):
        apply_tuning(model, {"conector": Full(lr=1)})
    with pytest.raises(ValueError, match=r"no parameter's name matches 'lm.\*.qq_proj.\*'"):
        apply_tuning(model, {"lm.*.qq_proj.*": Full(lr=1)})


def test_the_most_exact_word_decides(model: VisionLanguageModel) -> None:
    tune: dict[str, Tuning] = {
        "lm.*norm*": Frozen(),
        "lm": Full(lr=1e-3),
        "lm.head": Full(lr=1e-2),
        "lm.*.layers.0.*": Full(lr=1e-4),
    }
    found = rates(apply_tuning(model, tune))
    assert found.pop("lm.model.lm_head.weight") == 1e-2
    first = {name: rate for name, rate in found.items() if ".layers.0." in name}
    assert set(first.values()) == {1e-4}
    assert any("norm" in name for name in first)  # the later pattern has them
    others = {name: rate for name, rate in found.items() if name not in first}
    assert set(others.values()) == {1e-3}
    assert not any("norm" in name for name in others)
    open_ = {name for name, p in model.named_parameters() if p.requires_grad}
    assert open_ == set(first) | set(others) | {"lm.model.lm_head.weight"}
    reports = {r.part: r for r in describe(model, tune)}
    assert reports["encoder"].trained == reports["connector"].trained == 0
    assert reports["lm"].lr == 1e-2
    assert reports["lm"].frozen == 192 * (2 * 3 + 1)


def test_rates_fall_towards_the_first_layers(model: VisionLanguageModel) -> None:
    found = rates(apply_tuning(model, {"encoder": Full(lr=1.0, layer_decay=0.5)}))
    by_layer = {
        int(name.split(".layers.")[1].split(".")[0]): rate for name, rate in found.items() if ".layers." in name
    }
    assert by_layer == {0: 0.25, 1: 0.5, 2: 1.0}  # the fourth layer is above the one that is read
    assert {rate for name, rate in found.items() if "embedding" in name} == {0.125}
    with pytest.raises(ValueError, match=r"layer_decay=0\.5 needs numbered layers"):
        apply_tuning(model, {"lm.head": Full(lr=1.0, layer_decay=0.5)})


def test_only_new_rows_move(model: VisionLanguageModel, batch: Batch) -> None:
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = int(batch.input_ids.max()) // 2
    groups = apply_tuning(
        model, {"lm.embeddings": Full(lr=1e-2, first_row=first), "lm.head": Full(lr=1e-2, first_row=first)}
    )
    step(model, batch, groups)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert moved == {"lm.model.model.embed_tokens.weight", "lm.model.lm_head.weight"}
    for name in moved:
        now = dict(model.named_parameters())[name]
        assert torch.equal(now[:first], old[name][:first])
        assert not torch.equal(now[first:], old[name][first:])
    with pytest.raises(ValueError, match=r"first_row=5 is for the language model's embeddings and head"):
        apply_tuning(model, {"connector": Full(lr=1.0, first_row=5)})
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 would shrink them"):
        Full(lr=1.0, weight_decay=0.1, first_row=5)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_adapters_give_the_same_logits(model: VisionLanguageModel, batch: Batch, dora: bool) -> None:
    before = logits(model, batch)
    names = [name for name, _ in model.named_parameters()]
    tune: dict[str, Tuning] = {
        "connector": Full(lr=1e-2),
        "lm": LoRA(lr=1e-2, rank=4, alpha=8, dora=dora),
        "encoder": LoRA(lr=1e-3, rank=2, layers=("q_proj", "v_proj")),
    }
    groups = apply_tuning(model, tune)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-5)  # adapters begin at nothing
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    adapters = [name for group in groups for name in group.names if group.part == "encoder"]
    assert len(adapters) == 3 * 2 * 2  # of each layer that is read, two matrices a projection
    assert not any("lm_head" in name for group in groups for name in group.names)
    first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    step(model, batch, groups)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())
    still = [name for name, p in model.named_parameters() if name in first and torch.equal(p, first[name])]
    assert not still  # adapters of both parts are at work
    trained = logits(model, batch)
    assert (trained - before).abs().max() > 0.01
    merge_adapters(model)
    torch.testing.assert_close(logits(model, batch), trained, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in model.named_parameters()] == names
