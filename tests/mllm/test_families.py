"""Recipes of models that are not vision-language models: as large as the papers', and planned."""

from dataclasses import replace

import pytest

from cluster.plan import plan
from cluster.site import Site
from mllm.recipe import Recipe, dump, load
from mllm.recipes import by_name

SIZES = {
    "clip_b32": 151_277_313,
    "clip_b16": 149_620_737,
    "clip_l14": 427_616_513,
    "openclip_h14": 986_109_441,
    "siglip_b16": 203_155_970,
    "siglip_so400m": 877_960_498,
    "lenet5": 61_706,
    "alexnet": 60_965_224,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vit_b16": 86_567_656,
    "vit_l16": 304_326_632,
    "mae_b16": 111_907_840,
    "mae_l16": 329_541_888,
    "vilt_b32": 112_219_196,
    "albef": 85_844_736 + 123_073_536 + 1_017_917,
    "blip_base": 85_798_656 + 165_625_344 + 1_017_919,
    "blip_large": 303_301_632 + 170_343_936 + 1_083_455,
    "coca_base": 86_001_408 + 247_677_696 + 54_080_257,
    "coca_large": 303_571_968 + 418_317_312 + 74_204_161,
    "blip2_stage1": 985_952_256 + 185_684_736 + 1_017_918,
    "internvl_c": 5_902_793_600 + 6_680_883_200 + 36_352_897,
    "internvl_g": 5_902_793_600 + 7_842_306_048 + 56_668_931,
    "uniter_base": 114_110_333,
    "uniter_large": 342_087_037,
    "vl_bert_base": 114_492_283,
    "vl_bert_large": 342_072_699,
    "pixel_bert_r50": 135_190_396,
    "pixel_bert_x152": 232_005_756,
    "lxmert": 228_051_752,
    "beit_b16": 91_965_776 + 29_423_616,  # the second is the frozen tokenizer's
    "vlmo_base": 207_673_661 + 29_423_616,
    "vlmo_large": 605_354_813 + 29_423_616,
    "vl_beit_base": 207_621_437 + 29_423_616,
    "beit3_base": 263_798_029 + 29_423_616,
    "beit3_large": 673_852_941 + 29_423_616,
    "beit3_giant": 1_955_540_877 + 29_423_616,
    "eva_clip_g14": 1_136_492_161,
    "eva02_clip_l14": 427_755_457,
}
"""Weights of each, as its model card or `transformers`' own class has them."""


def with_few_documents(recipe: Recipe) -> Recipe:
    """The same with packs of four documents: what is counted of a pack is counted document by document."""
    tiling = recipe.tiling
    context = 4 * (recipe.model.layout(tiling).tokens(tiling.cut(tiling.size, tiling.size)) + 2)
    return replace(recipe, stages=tuple(replace(stage, context=min(context, stage.context)) for stage in recipe.stages))


@pytest.mark.parametrize("name", SIZES)
def test_it_is_as_large_as_the_original_and_round_trips(name: str, site: Site) -> None:
    recipe = by_name(name)
    assert recipe.name == name
    assert load(dump(recipe)) == recipe
    assert sum(p.numel() for p in recipe.model.meta().parameters()) == SIZES[name]
    planned = plan(with_few_documents(recipe), site, ())
    assert all(stage.flops or stage.unknown for stage in planned.stages)
    assert sum(part.trained + part.frozen for part in planned.stages[0].parts) == SIZES[name]
