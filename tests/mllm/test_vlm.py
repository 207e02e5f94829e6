"""The model over packs: documents are alone in company, gradients are where the stage says, counts are the layout's."""

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mllm.objectives import Ids, NextToken
from mllm.recipe import Recipe
from mllm.tune import apply_tuning
from mllm.vlm import VisionLanguageModel
from pipelines.types import IMAGE_TOKEN, Batch, Pack, Sample
from pipelines.windows import PackWindows


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> VisionLanguageModel:
    torch.manual_seed(0)
    return recipe.vlm.build()


def samples_of(packs: PackWindows) -> list[Sample]:
    samples, dropped = packs.samples(packs.rows(0))
    assert not dropped
    return [s for s in samples if s.tiles and len(s.input_ids) < 120][:3] + [s for s in samples if not s.tiles][:2]


def together(packs: PackWindows, samples: list[Sample]) -> Pack:
    return Pack.of_samples(samples, packs.pixels(samples))


def test_a_documents_loss_in_a_pack_is_its_loss_alone(model: VisionLanguageModel, packs: PackWindows) -> None:
    samples = samples_of(packs)
    assert len(samples) == 5
    packed = NextToken()(model, Batch.of(together(packs, samples)))
    for place, sample in enumerate(samples):
        alone = NextToken()(model, Batch.of(together(packs, [sample])))
        torch.testing.assert_close(packed.documents[place], alone.documents[0], rtol=1e-5, atol=1e-5)
    assert packed.sum.item() == pytest.approx(float(packed.documents[:, 0].sum()), rel=1e-5)


WEIGHTED = NextToken(z_loss=1e-3, text_alone=0.5, codes=Ids(first=300, last=900), codes_weight=3.0)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 3), min_size=5, max_size=5), st.randoms(use_true_random=False))
def test_sums_weights_and_gradients_do_not_know_how_documents_are_packed(
    model: VisionLanguageModel, packs: PackWindows, places: list[int], dice: random.Random
) -> None:
    samples = [
        replace(sample, weight=weight) for sample, weight in zip(samples_of(packs), (1, 2, 1, 3, 1), strict=True)
    ]
    expected = sums([samples], model, packs)
    spread = [[sample for sample, place in zip(samples, places, strict=True) if place == n] for n in range(4)]
    for pack in spread:
        dice.shuffle(pack)
    for ours, theirs in zip(sums(spread, model, packs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def sums(spread: list[list[Sample]], model: VisionLanguageModel, packs: PackWindows) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, weight and some gradients, summed over packs as an engine does."""
    model.zero_grad()
    outputs = [WEIGHTED(model, Batch.of(together(packs, samples))) for samples in spread]
    for output in outputs:
        output.sum.backward()
    gradients = [p.grad.flatten()[:2000] for p in model.connector.parameters() if p.grad is not None]
    assert model.lm.head.grad is not None
    total = torch.stack([output.sum.detach() for output in outputs]).sum()
    weight = torch.stack([output.weight for output in outputs]).sum()
    return total, weight, torch.cat([*gradients, model.lm.head.grad.flatten()[:2000]])


def test_modalities_count_as_often_as_they_are_said_to(model: VisionLanguageModel, packs: PackWindows) -> None:
    samples = samples_of(packs)
    plain = NextToken()(model, Batch.of(together(packs, samples)))
    pictured, text = plain.documents[:3], plain.documents[3:]
    halved = NextToken(text_alone=0.5)(model, Batch.of(together(packs, samples)))
    assert halved.sum.item() == pytest.approx(float(pictured[:, 0].sum() + text[:, 0].sum() / 2), rel=1e-5)
    assert halved.weight.item() == pytest.approx(float(pictured[:, 1].sum() + text[:, 1].sum() / 2))
    batch = Batch.of(together(packs, samples))
    tripled = NextToken(codes=Ids(first=300, last=900), codes_weight=3.0)(model, batch)
    codes = int(((batch.labels >= 300) & (batch.labels <= 900)).sum())
    assert 0 < codes < plain.weight.item()
    assert tripled.weight.item() == pytest.approx(plain.weight.item() + 2 * codes)


def test_packs_hold_the_visual_tokens_that_the_layout_counts(recipe: Recipe, packs: PackWindows) -> None:
    layout = recipe.vlm.layout(recipe.tiling)
    tower = recipe.vlm.build().encoder
    for pack in islice(packs.packs(1), 4):
        batch = Batch.of(pack)
        assert int((batch.input_ids == IMAGE_TOKEN).sum()) == batch.visual_count == pack.cuts[:, 1].sum()
        if len(pack.tiles):
            assert tower(batch.tiles).shape[:2] == (len(pack.tiles), layout.tokens_per_tile)


@pytest.mark.parametrize("kind", ["mixed", "text", "empty"])
@pytest.mark.parametrize("stage", ["align", "pretrain", "sft"])
def test_gradients_exist_exactly_where_the_stage_says(
    recipe: Recipe, packs: PackWindows, stage: str, kind: str
) -> None:
    model = recipe.vlm.build()
    apply_tuning(model, recipe.stage(stage).tune)
    samples = samples_of(packs)
    chosen = {"mixed": samples, "text": [s for s in samples if not s.tiles], "empty": []}[kind]
    NextToken()(model, Batch.of(together(packs, chosen))).sum.backward()
    tuned = {id(p) for part in recipe.stage(stage).tune for p in model.parts()[part]}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in tuned), name
    moved = float(sum(p.grad.abs().sum() for p in model.connector.parameters() if p.grad is not None))
    assert (moved > 0) == (kind == "mixed")


def test_the_image_reaches_the_loss(model: VisionLanguageModel, packs: PackWindows) -> None:
    pack = together(packs, [s for s in samples_of(packs) if s.tiles][:1])
    black = replace(pack, tiles=pack.tiles * 0)
    losses = [NextToken()(model, Batch.of(p)).sum.item() for p in (pack, black)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_a_pipeline_of_another_model_is_refused(model: VisionLanguageModel, packs: PackWindows) -> None:
    batch = Batch.of(together(packs, [s for s in samples_of(packs) if s.tiles][:1]))
    batch.tiles = torch.cat([batch.tiles, batch.tiles])
    with pytest.raises(ValueError, match="36 image positions and the encoder gave 72 visual tokens"):
        model(batch)


def test_over_fitting_two_documents_learns_them(recipe: Recipe, packs: PackWindows) -> None:
    torch.manual_seed(0)
    model = recipe.vlm.build()
    groups = apply_tuning(model, recipe.stage("sft").tune)
    optimizer = torch.optim.AdamW([p for g in groups for p in g.parameters], lr=3e-3)
    batch = Batch.of(together(packs, samples_of(packs)[:2]))
    losses = []
    for _ in range(25):
        output = NextToken()(model, batch)
        loss = output.sum / output.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_weights_of_another_shape_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    model = recipe.vlm.build()
    model.lm.model.save_pretrained(tmp_path)
    wider = replace(recipe.vlm.lm, weights="mine", arch=replace(recipe.vlm.lm.arch, layers=5))
    with pytest.raises(ValueError, match=r"num_hidden_layers=4 and the recipe's arch says 5"):
        wider.build(lambda _: str(tmp_path))
    same = replace(recipe.vlm.lm, weights="mine").build(lambda _: str(tmp_path))
    assert torch.equal(same.head, model.lm.head)


def test_a_loss_weight_counts_a_documents_tokens_so_many_times(model: VisionLanguageModel, packs: PackWindows) -> None:
    samples = samples_of(packs)[:2]
    doubled = together(packs, [replace(samples[0], weight=2.0), samples[1]])
    output = NextToken()(model, Batch.of(doubled))
    losses, tokens = output.documents[:, 0], output.documents[:, 1]
    assert output.sum.item() == pytest.approx(float(2 * losses[0] + losses[1]), rel=1e-5)
    assert output.weight.item() == pytest.approx(float(2 * tokens[0] + tokens[1]))
