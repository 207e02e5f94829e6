"""Systems whose language models meet pictures otherwise: their sizes without memory, and their small forms."""

from functools import cache

import pytest

from mllm.recipe import Recipe, dump, load
from mllm.recipes import FUSED, by_name
from mllm.tiny import tiny
from mllm.tune import describe

NAMES = [recipe.__name__ for recipe in FUSED]

SIZES = {
    # name: parameters of encoder, connector, fusion, language model; positions of a tile
    "flamingo_3b": (430_561_380, 172_399_104, 1_157_826_608, 1_339_478_016, 1),
    "flamingo_9b": (430_561_380, 172_399_104, 1_442_975_760, 6_705_782_784, 1),
    "flamingo_80b": (430_561_380, 172_399_104, 7_659_167_766, 64_954_712_064, 1),
    "openflamingo_3b": (303_179_776, 64_068_608, 881_002_544, 1_311_213_568, 1),
    "openflamingo_4b": (303_179_776, 64_068_608, 897_747_488, 2_775_864_320, 1),
    "openflamingo_9b": (303_179_776, 64_068_608, 1_115_820_048, 6_649_286_656, 1),
    "otter_9b": (303_179_776, 64_068_608, 1_115_820_048, 6_649_286_656, 1),
    "idefics_9b": (630_766_080, 125_961_984, 1_434_527_760, 6_738_415_616, 1),
    "llama_adapter_7b": (303_179_776, 104_923_136, 1_274_848, 6_738_415_616, 1),
    "cogvlm_17b": (4_280_908_800, 142_622_720, 6_476_005_376, 6_738_415_616, 1_227),
    "cogvlm2_19b": (4_280_908_800, 196_364_032, 6_979_321_856, 8_030_261_248, 2_306),
    "cogagent_18b": (4_590_518_208, 142_622_720, 6_811_680_768, 6_738_415_616, 258),
    "cambrian_1_8b": (2_696_371_952, 82_191_360, 220_569_600, 8_030_261_248, 600),
    "cambrian_1_13b": (2_696_371_952, 92_680_192, 241_541_120, 13_015_864_320, 600),
    "cambrian_1_34b": (2_696_371_952, 119_949_312, 255_135_744, 34_388_917_248, 600),
    "crome_7b": (985_952_256, 114_083_328, 5_242_880, 6_738_415_616, 289),
    "crome_13b": (985_952_256, 116_313_600, 6_553_600, 13_015_864_320, 289),
    "crome_flan_t5_xxl": (985_952_256, 114_083_328, 5_242_880, 11_003_736_064, 289),
}


@cache
def small(name: str) -> Recipe:
    return tiny(by_name(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_has_its_size(name: str) -> None:
    recipe = by_name(name)
    found = {report.part: report.trained + report.frozen for report in describe(recipe.model.meta(), {})}
    layout = recipe.model.layout(recipe.tiling)
    parts = tuple(found[part] for part in ("encoder", "connector", "fusion", "lm"))
    assert (*parts, layout.tokens_per_tile) == SIZES[name]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_whole_value_and_so_is_its_small_form(name: str) -> None:
    recipe = by_name(name)
    assert recipe.name == name
    assert load(dump(recipe)) == recipe
    assert load(dump(small(name))) == small(name)
