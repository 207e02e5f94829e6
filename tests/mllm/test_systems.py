"""Every system whose pictures stand in the sequence: its papers' sizes without memory, its small form, its plan."""

from dataclasses import replace
from functools import cache

import pytest

from cluster.plan import plan
from cluster.site import load_site
from mllm.objectives import NextToken
from mllm.recipe import Recipe, Steps, dump, load
from mllm.recipes import TOWERS_AND_SPLICE, by_name
from mllm.tiny import example_of, tiny
from pipelines.corpora import Conversations, Interleaved, Pairs, TextOnly
from tests.conftest import ROOT

SITE = load_site(str(ROOT / "examples" / "site.toml"))
NAMES = [recipe.__name__ for recipe in TOWERS_AND_SPLICE]


@cache
def small(name: str) -> Recipe:
    return tiny(by_name(name))


SIZES = {
    # name: parameters of encoder, connector, language model; tokens of a picture of 1,000 x 700
    "llava_7b": (303_179_776, 4_198_400, 6_738_415_616, 256),
    "llava_15_7b": (303_507_456, 20_979_712, 6_738_415_616, 576),
    "llava_15_13b": (303_507_456, 31_467_520, 13_015_864_320, 576),
    "llava_15_7b_lora": (303_507_456, 20_979_712, 6_738_415_616, 576),
    "llava_next_7b": (303_507_456, 20_983_808, 6_738_415_616, 2_242),
    "llava_next_13b": (303_507_456, 31_472_640, 13_015_864_320, 2_242),
    "llava_next_34b": (303_507_456, 58_741_760, 34_388_917_248, 2_242),
    "llava_next_llama3_8b": (303_507_456, 20_983_808, 8_030_261_248, 2_242),
    "llava_next_mistral_7b": (303_507_456, 20_983_808, 7_241_732_096, 2_242),
    "llava_next_qwen_72b": (303_507_456, 75_522_048, 72_287_920_128, 2_242),
    "llava_next_qwen_110b": (303_507_456, 75_522_048, 111_209_914_368, 2_242),
    "llava_next_video_7b": (303_507_456, 20_979_712, 6_738_415_616, 144),
    "llava_next_video_7b_dpo": (303_507_456, 20_979_712, 6_738_415_616, 144),
    "llava_next_interleave_0_5b": (412_987_248, 2_230_272, 463_987_712, 729),
    "llava_next_interleave_7b": (412_987_248, 21_504_000, 7_721_324_544, 729),
    "llava_next_interleave_14b": (412_987_248, 32_122_880, 14_167_290_880, 729),
    "vila_15_3b": (412_987_248, 18_364_416, 2_701_560_320, 196),
    "vila_15_3b_s2": (412_987_248, 30_170_112, 2_701_560_320, 196),
    "vila_15_8b": (412_987_248, 35_668_992, 8_030_261_248, 196),
    "vila_15_13b": (412_987_248, 49_826_816, 13_015_864_320, 196),
    "vila_15_40b": (5_536_496_000, 143_170_560, 34_388_917_248, 256),
    "internvl_10_13b": (5_902_793_600, 7_480_279_040, 13_015_864_320, 96),
    "internvl_12_40b": (5_905_251_200, 143_184_896, 34_388_917_248, 258),
    "internvl_15_26b": (5_536_496_000, 116_442_112, 19_861_149_696, 1_794),
    "minicpm_v_20": (412_987_248, 29_378_304, 3_007_703_808, 333),
    "minicpm_llama3_v_25": (412_987_248, 89_059_328, 8_030_261_248, 493),
    "llava_uhd_13b": (303_507_456, 137_113_600, 13_015_864_320, 1_013),
    "minigpt4_7b": (985_952_256, 108_312_064, 6_738_415_616, 32),
    "instructblip_7b": (985_952_256, 188_834_560, 6_738_415_616, 32),
    "bliva_7b": (985_952_256, 114_083_328, 6_738_415_616, 289),
    "mplug_owl_7b": (303_179_776, 81_473_536, 6_738_415_616, 65),
    "shikra_7b": (303_179_776, 4_198_400, 6_738_415_616, 256),
    "kosmos_1": (303_179_776, 65_122_304, 1_872_885_760, 66),
    "blip2_opt_2_7b": (985_952_256, 107_130_880, 2_651_596_800, 32),
    "blip2_opt_6_7b": (985_952_256, 108_312_064, 6_658_473_984, 32),
    "blip2_flan_t5_xl": (985_952_256, 106_737_152, 2_783_959_040, 32),
    "mini_gemini_7b": (499_737_792, 27_943_168, 6_738_415_616, 576),
    "qwen_vl_7b": (1_842_777_344, 91_799_552, 7_721_324_544, 258),
    "glm4v_9b": (4_280_908_800, 214_454_272, 9_399_951_360, 1_602),
}


def sizes(name: str) -> tuple[int, int, int, int]:
    recipe = by_name(name)
    model = recipe.vlm.meta()
    connector = [*model.connector.parameters(), *model.join.parameters()]
    parts = (model.encoder.parameters(), connector, model.lm.parameters())
    encoder, between, lm = (sum(p.numel() for p in part) for part in parts)
    cut = recipe.tiling.cut(height=700, width=1000)
    return encoder, between, lm, recipe.vlm.layout(recipe.tiling).tokens(cut)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_the_papers_size(name: str) -> None:
    assert sizes(name) == SIZES[name]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_whole_value_and_so_is_its_small_form(name: str) -> None:
    recipe = by_name(name)
    assert recipe.name == name
    assert load(dump(recipe)) == recipe
    little = small(name)
    assert load(dump(little)) == little
    assert [stage.name for stage in little.stages] == [stage.name for stage in recipe.stages]
    assert {stage.duration for stage in little.stages} == {Steps(count=2)}
    assert sum(p.numel() for p in little.vlm.meta().parameters()) < 3_000_000


@pytest.mark.parametrize(
    "name", ["llava_next_7b", "minicpm_v_20", "vila_15_3b_s2", "mini_gemini_7b", "bliva_7b", "internvl_15_26b"]
)
def test_it_is_planned(name: str) -> None:
    """Cost and memory are found, whatever towers, connectors and joins; where more is trained, more is computed."""
    recipe = small(name)
    stages = [stage for stage in recipe.stages if isinstance(stage.objective, NextToken)]
    recipe = replace(recipe, stages=(stages[0], stages[-1]))
    planned = plan(recipe, SITE, (1, 8))
    first, last = (stage.flops for stage in (planned.stages[0], planned.stages[-1]))
    assert first is not None
    assert last is not None
    assert last > first > 0
    assert all(stage.memory[1] > stage.memory[8] > 0 for stage in planned.stages)
    assert planned.tokens_per_image.startswith(f"{small(name).model.layout(small(name).tiling).tokens_per_tile} tokens")


def test_tiny_is_a_laptops_whatever_it_is_given() -> None:
    recipe = small("llava_next_7b")
    assert recipe.vlm.lm.tokenizer == "example-bpe"
    assert recipe.vlm.lm.weights is None
    assert {source.corpus.name for stage in recipe.stages for source in stage.mixture} <= set(SITE.corpora)
    assert all(stage.context <= 512 for stage in recipe.stages)


def test_examples_stand_for_corpora_of_their_kind() -> None:
    kinds = (Pairs(name="a"), Interleaved(name="b"), Conversations(name="c"), TextOnly(name="d"))
    assert [example_of(corpus).kind for corpus in kinds] == [corpus.kind for corpus in kinds]
    assert {example_of(corpus, "-heldout").name for corpus in kinds} <= set(SITE.corpora)


def test_sources_that_one_example_stands_for_keep_their_shares() -> None:
    recipe = by_name("minigpt4_7b")
    align = recipe.stages[0]
    weights = [source.weight for source in align.mixture]
    (source,) = tiny(replace(recipe, stages=(align,))).stages[0].mixture
    assert source.weight == sum(weight or 0 for weight in weights)
