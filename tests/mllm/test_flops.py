"""FLOPs told by the model without memory are those that torch's counter sees on real tensors."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cluster.counted import model_cost, stage_cost
from cluster.fullest import fullest, of_documents
from cluster.recompute import recompute as computed_again
from mllm.encoders import Encoder, MobileNetV2
from mllm.flops import Cost, Flops, Work, cost_of, work_of
from mllm.objectives import Gathered, NextToken, OneOf
from mllm.recipe import Full, Recipe, Recompute, Stage
from mllm.recipes import by_name
from mllm.tiny import tiny
from mllm.tune import apply_tuning
from mllm.vlm import VLM
from mllm.whole_flops import UncountedError, pack_flops
from ops.losses import linear_cross_entropy
from pipelines.tiling import Pad
from pipelines.types import Batch, Pack
from pipelines.windows import PackWindows, Stream

RATE = Full(lr=1e-3)
TUNES = {
    "align": ("connector",),
    "all": ("encoder", "connector", "lm"),
    "encoder": ("encoder",),
    "frozen head": ("connector", "lm.layers"),
}


@cache
def recipe_of(tower: str) -> Recipe:
    recipe = by_name("vila_smoke")
    if tower == "clip":
        return recipe
    model: VLM = replace(recipe.vlm, encoder=Encoder(arch=MobileNetV2(), layer=-1))
    return replace(recipe, model=model, tiling=Pad(size=96))


def told(recipe: Recipe, tune: str, recompute: Recompute = "none", patches: int | None = None) -> Cost:
    model = recipe.vlm.meta()
    apply_tuning(model, dict.fromkeys(TUNES[tune], RATE))
    return cost_of(model, recipe.stages[0].objective, recipe.vlm.layout(recipe.tiling), recompute, patches)


def counted(recipe: Recipe, tune: str, pack: Pack, recompute: str = "none") -> int:
    """By torch's counter, which knows neither the kernels of a CPU's attention nor the causal mask: plain products, all pairs."""
    model = recipe.vlm.build()
    apply_tuning(model, dict.fromkeys(TUNES[tune], RATE))
    model.train()
    if recompute == "full":
        for unit in model.units():
            computed_again(model, unit, "full")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        NextToken()(model, Batch.of(pack)).sum.backward()
    return counter.get_total_flops()


def all_pairs(pack: Pack) -> Work:
    lengths = np.diff(pack.cu_seqlens.astype(np.int64))
    return replace(work_of(pack), pairs=int((lengths**2).sum()))


def short(recipe: Recipe, tokens: int = 96, tiles: int = 2) -> tuple[Stage, Pack]:
    stage = replace(recipe.stages[0], context=tokens, max_tiles=tiles, tokens_per_step=4 * tokens)
    return stage, fullest(recipe, stage)


@pytest.mark.parametrize("tower", ["clip", "mobilenet"])
@pytest.mark.parametrize("tune", list(TUNES))
def test_told_is_counted(tower: str, tune: str) -> None:
    recipe = recipe_of(tower)
    _, pack = short(recipe)
    assert told(recipe, tune).model_flops(all_pairs(pack)) == pytest.approx(counted(recipe, tune, pack), rel=1e-9)


def test_real_packs_of_several_documents_are_counted_alike(recipe: Recipe, stream: Stream) -> None:
    packs = [pack for pack in PackWindows(stream).packs(0) if len(pack.cu_seqlens) > 2]
    pictures = next(pack for pack in packs if len(pack.tiles))
    text = next(pack for pack in PackWindows(stream).packs(0) if not len(pack.tiles))
    cost = told(recipe, "all")
    assert cost.model_flops(all_pairs(pictures)) == pytest.approx(counted(recipe, "all", pictures), rel=1e-9)
    # Without pictures the model sees one blank tile, which is computed and not needed.
    work = all_pairs(text)
    blank = cost.model.per_tile
    assert cost.model_flops(work) + blank == pytest.approx(counted(recipe, "all", text), rel=1e-9)
    assert cost.hardware_flops(replace(work, pairs=0)) == pytest.approx(
        cost.model_flops(replace(work, pairs=0)) + cost.hardware.per_tile, rel=1e-9
    )


@pytest.mark.parametrize("tune", ["align", "all"])
def test_what_is_computed_again_is_in_the_hardware_s_flops_alone(tune: str) -> None:
    recipe = recipe_of("clip")
    _, pack = short(recipe)
    kept, again = told(recipe, tune), told(recipe, tune, "full")
    work = all_pairs(pack)
    more = counted(recipe, tune, pack, "full") - counted(recipe, tune, pack)
    assert more > 0
    assert again.hardware_flops(work) - kept.hardware_flops(work) == pytest.approx(more, rel=1e-9)
    assert again.model == kept.model
    assert told(recipe, tune, "selective") == kept


def test_attention_s_backward_makes_five_products_where_four_are_needed() -> None:
    cost = told(recipe_of("clip"), "all")
    arch = recipe_of("clip").vlm.lm.arch
    product = 2 * arch.hidden_size * arch.layers
    assert cost.model.per_pair == 6 * product
    assert cost.hardware.per_pair == 7 * product


def test_what_is_frozen_costs_less() -> None:
    recipe = recipe_of("clip")
    everything, align, encoder, head = (told(recipe, tune).model for tune in ("all", "align", "encoder", "frozen head"))
    # A frozen language model on trained visual tokens: forward and the gradient by its input, and no gradient by its weights.
    assert 3 * align.per_token == pytest.approx(2 * everything.per_token)
    assert 3 * align.per_learned == 2 * everything.per_learned == 3 * head.per_learned
    assert head.per_token == everything.per_token
    assert align.per_tile < encoder.per_tile < everything.per_tile
    patches = recipe.vlm.tower.arch.tokens(recipe.tiling.size)
    assert (
        told(recipe, "align", patches=patches).model.per_tile < align.per_tile / 2
    )  # the encoder's features come along


def test_work_adds_up_over_documents_and_packs() -> None:
    recipe = recipe_of("clip")
    cost = told(recipe, "all")
    _, pack = short(recipe, 96, 2)
    _, other = short(recipe, 70, 1)
    one, two = work_of(pack), work_of(other)
    lengths = np.array([0, 96, 166], np.int32)
    both = replace(
        pack,
        input_ids=np.concatenate([pack.input_ids, other.input_ids]),
        labels=np.concatenate([pack.labels, other.labels]),
        cu_seqlens=lengths,
        tiles=np.concatenate([pack.tiles, other.tiles]),
        cuts=np.concatenate([pack.cuts, other.cuts]),
    )
    assert work_of(both) == one + two
    for flops in (cost.model_flops, cost.hardware_flops):
        assert flops(one + one) == pytest.approx(2 * flops(one))
        assert flops(work_of(both)) == pytest.approx(flops(one) + flops(two))


@pytest.mark.parametrize("name", ["llava_next_video_7b_dpo", "vila_15_3b", "minicpm_v_20"])
def test_answers_that_are_compared_are_counted_with_what_a_reference_reads(name: str) -> None:
    """Beside torch's counter on the answers' own pack. Logits that are computed twice over are needed once."""
    recipe = tiny(by_name(name))
    stage = recipe.stage("dpo")
    pack = fullest(recipe, stage)
    batch = Batch.of(pack)
    model = recipe.vlm.build()
    apply_tuning(model, stage.tune)
    objective: Any = stage.objective
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as training:
        objective(model, batch).sum.backward()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as reading:
        linear_cross_entropy(model(batch), model.lm.head, batch.labels)
    logits = 2 * model.lm.head.numel() * pack.learned
    shapes = recipe.model.meta()
    apply_tuning(shapes, stage.tune)
    whole, own = model_cost(shapes, recipe, stage, references=True), stage_cost(recipe, stage)
    work = all_pairs(pack)
    trained, read = training.get_total_flops(), reading.get_total_flops()
    assert own.model_flops(work) == pytest.approx(trained - logits, rel=1e-9)
    assert whole.model_flops(work) == pytest.approx(trained - logits + read, rel=1e-9)
    seen = replace(work, pairs=0)  # attention's backward computes its scores again besides
    assert own.hardware_flops(seen) - own.model_flops(seen) == pytest.approx(logits + again_of(own, pack), rel=1e-9)
    assert whole.hardware_flops(seen) - own.hardware_flops(seen) == whole.model_flops(seen) - own.model_flops(seen)


def again_of(cost: Cost, pack: Pack) -> float:
    """What attention in the encoder computes again for a pack's tiles."""
    return (cost.hardware.per_tile - cost.model.per_tile) * len(pack.tiles)


def test_what_goes_through_experts_is_taken_for_nothing_else() -> None:
    """However many image positions CogAgent's counted pack has: 13 divides their number, and is a number of documents as well."""
    recipe = by_name("cogagent_18b")
    cost = stage_cost(recipe, recipe.stages[0])
    assert cost.model.per_document == cost.hardware.per_document == 0
    assert cost.hardware.per_tile > cost.model.per_tile > 0


def test_seven_billion_parameters_take_six_flops_each_a_token() -> None:
    """Kaplan et al. (arXiv:2001.08361, 2.1): 6 N a token, and attention's share on top."""
    recipe = by_name("vila_7b")
    model = recipe.vlm.meta()
    apply_tuning(model, {"connector": RATE, "lm": RATE})
    flops: Flops = cost_of(model, recipe.stages[0].objective, recipe.vlm.layout(recipe.tiling)).model
    length = 4096
    work = Work(tokens=length, learned=length, pairs=length * (length + 1) // 2)
    weights = sum(layer.weight.numel() for layer in model.lm.modules() if isinstance(layer, nn.Linear))
    parameters = sum(parameter.numel() for parameter in model.lm.parameters())
    attention = 6 * 32 * 4096 * (length + 1)  # 12 x layers x width x half the pairs a token
    assert flops.of(work) / length == pytest.approx(6 * weights + attention)
    assert flops.of(work) / length == pytest.approx(6 * parameters, rel=0.07)


def test_a_product_that_grows_with_something_else_is_named() -> None:
    class Odd(nn.Linear):
        def forward(self, features: torch.Tensor) -> torch.Tensor:  # type: ignore[override] -- a stand-in for a connector
            return super().forward(features) * (self.weight @ self.weight.T).sum()

    recipe = recipe_of("clip")
    model = recipe.vlm.meta()
    model.connector = Odd(128, model.lm.width, device="meta")
    with pytest.raises(ValueError, match="grow with nothing"):
        cost_of(model, recipe.stages[0].objective, recipe.vlm.layout(recipe.tiling))


KINDS = (
    *("clip_b32", "siglip_b16", "eva_clip_g14", "vit_b16", "resnet50", "mae_b16", "beit_b16", "vl_bert_base"),
    *("pixel_bert_r50", "lxmert", "albef", "blip_base", "coca_base", "blip2_stage1", "internvl_c", "internvl_g"),
    *("vilt_b32", "uniter_base", "vlmo_base", "vl_beit_base", "beit3_base", "fromage", "blip2_flan_t5_xl"),
)


def test_what_hangs_on_numbers_is_not_counted() -> None:
    class Odd:
        kind = "odd"

        def __call__(self, model: Any, batch: Batch) -> Any:
            raise AssertionError(float(model.encode_tiles(batch).sum()))

    recipe = tiny(by_name("mae_b16"))
    model: Any = recipe.model.meta()
    model.encode_tiles = lambda batch: batch.tiles.float()
    objective: Any = Odd()
    with pytest.raises(UncountedError, match=r"what 'odd' computes with .* hangs on its numbers"):
        pack_flops(model, objective, Batch.of(fullest(recipe, recipe.stages[0])))


def seen(model: Any, objective: Any, batch: Batch) -> float:
    """By torch's counter, on numbers. Of several objectives that a step has one of, their mean."""
    if isinstance(objective, OneOf):
        shares = [term.weight / sum(term.weight for term in objective.terms) for term in objective.terms]
        each = [seen(model, term.objective, batch) for term in objective.terms]
        return sum(share * one for share, one in zip(shares, each, strict=True))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        found = objective.collect(model, batch) if isinstance(objective, Gathered) else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if found is None:
            output = objective(model, batch)
        else:
            with torch.no_grad():
                told_it = objective.whole([found], None)[0]
            output = objective.again(model, batch, told_it)
        output.sum.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", KINDS)
def test_a_pack_of_another_kind_is_counted_as_a_whole(name: str) -> None:
    """Of each of its stages, beside torch's counter on the same pack with numbers in it; what it costs by its work tells as much,
    and of a pack that nobody counted too.
    """
    recipe = tiny(by_name(name))
    for stage in recipe.stages:
        shapes = recipe.model.meta()
        apply_tuning(shapes, stage.tune)
        torch.manual_seed(0)
        model = recipe.model.build()
        apply_tuning(model, stage.tune)
        pack = fullest(recipe, stage)
        whole = pack_flops(shapes, stage.objective, Batch.of(pack))
        assert whole == pytest.approx(
            seen(model, stage.objective, Batch.of(pack)), rel=0.02
        )  # who is hard, numbers say
        assert whole > 0
        cost = stage_cost(recipe, stage)
        alike = of_documents(recipe, stage)
        whole = pack_flops(shapes, stage.objective, Batch.of(alike))
        assert cost.model_flops(work_of(alike)) == pytest.approx(whole, rel=0.02)
        if not len(pack.tiles):  # each such pack sees a blank tile, however few documents it has
            continue
        half = replace(stage, context=stage.context // 2, max_tiles=max(1, stage.max_tiles // 2))
        other = of_documents(recipe, half, 0.25)
        assert cost.model_flops(work_of(other)) == pytest.approx(
            pack_flops(shapes, stage.objective, Batch.of(other)), rel=0.03
        )
