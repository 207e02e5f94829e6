"""Every shipped recipe is a whole value; overrides are checked and their faults explained."""

import re
import shlex

import pytest

from cluster.plan import plan
from cluster.site import load_site
from mllm.recipe import Full, Recipe, RecipeError, Steps, dump, fingerprint, load, override
from mllm.recipes import RECIPES, by_name
from mllm.tiny import tiny
from mllm.tune import peak_rate
from tests.conftest import ROOT

SITE = load_site(str(ROOT / "examples" / "site.toml"))


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name.startswith("vila_") and not name.startswith("vila_15")]
)
def test_it_builds_round_trips_and_is_planned(name: str) -> None:
    recipe = by_name(name)
    assert recipe.name == name
    assert load(dump(recipe)) == recipe
    planned = plan(recipe, SITE, (2, 16) if name == "vila_smoke" else ())
    assert [stage.name for stage in planned.stages] == ["align", "pretrain", "sft"]
    for stage in planned.stages:
        assert any(part.trained for part in stage.parts)
        memory = list(stage.memory.values())
        assert memory == sorted(memory, reverse=True)
        known = isinstance(recipe.stage(stage.name).duration, Steps)
        assert (stage.total_flops is not None) == known
        assert stage.flops is not None
        assert stage.flops > 0


@pytest.mark.parametrize(
    ("name", "language", "steps"), [("vila_7b", 6_738_415_616, 256), ("vila_13b", 13_015_864_320, 256)]
)
def test_vila_is_the_papers(name: str, language: int, steps: int) -> None:
    recipe = by_name(name)
    model = recipe.vlm.meta()
    assert sum(p.numel() for p in model.lm.parameters()) == language
    assert recipe.vlm.layout(recipe.tiling).tokens_per_tile == 576
    rates = [(s.name, sorted(s.tune), peak_rate(s.tune), s.context) for s in recipe.stages]
    assert rates == [
        ("align", ["connector"], 1e-3, 2048),
        ("pretrain", ["connector", "lm"], 5e-5, 4096),
        ("sft", ["connector", "lm"], 2e-5, 4096),
    ]
    assert recipe.stages[0].tokens_per_step // (576 + 50) == pytest.approx(steps, rel=0.01)
    assert {s.schedule.warmup for s in recipe.stages} == {0.03}
    assert all(isinstance(how, Full) and how.weight_decay == 0 for s in recipe.stages for how in s.tune.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.pretrian.tune.lm.lr=3e-5", "no stage 'pretrian'; stages are ['align', 'pretrain', 'sft']"),
        ("stages.align.tune.connector.lrr=1", "stages.align.tune.connector has no field 'lrr'; did you mean 'lr'?"),
        ('model.connector={"kind":"qformerr"}', "did you mean 'q_former'?"),
        ("stages.align.tune.connector.lr=-1", "greater than 0"),
        ("stages.align.context=20", "one tile is 36 tokens and a pack holds 20"),
        ("stages.align.tokens_per_step=100", "less than one pack of context=512"),
        ("tiling.size=64", "tiles of 64 pixels and the encoder takes 96"),
        ("model.lm.arch.context=300", "context=512 exceeds the language model's 300"),
        ("sed=1", "did you mean 'seed'?"),
        ("nonsense", "write key=value"),
    ],
)
def test_a_wrong_override_is_refused_with_what_was_expected(change: str, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        override(by_name("vila_smoke"), [change])
    assert words in str(error.value)


PAGE = [
    line
    for page in ("training.md", "faults.md")
    for line in (ROOT / "docs" / page).read_text().splitlines()
    if line.startswith("    -s ")
]


@pytest.mark.parametrize("line", PAGE)
def test_what_the_page_on_training_shows_can_be_said(line: str) -> None:
    recipe = by_name("vila_smoke")
    (change,) = shlex.split(line, comments=True)[1:]
    assert override(recipe, [change]) != recipe or '{"kind":"fsdp"}' in change


def test_a_kind_may_be_written_without_its_underscores() -> None:
    recipe = by_name("llava_15_7b")
    written, meant = (override(recipe, [f'model.connector={{"kind":"{kind}"}}']) for kind in ("qformer", "q_former"))
    assert written == meant != recipe
    within = override(by_name("vila_smoke"), ['model.connector={"kind":"branches","parts":[{"kind":"pixelshuffle"}]}'])
    assert within.vlm.connector.parts[0].kind == "pixel_shuffle"  # type: ignore[union-attr]  # branches


def test_an_override_changes_one_thing() -> None:
    recipe = by_name("vila_smoke")
    changed = override(
        recipe, ["stages.pretrain.tune.lm.lr=3e-5", "stages.sft.duration.count=7", 'stages.align.tune.lm.head={"lr":1}']
    )
    assert changed.stage("pretrain").tune["lm"] == Full(lr=3e-5)
    assert changed.stage("sft").duration == Steps(count=7)
    assert sorted(changed.stage("align").tune) == ["connector", "lm.head"]
    assert override(recipe, ["stages.pretrain.tune.lm=null"]).stage("pretrain").tune.keys() == {"connector"}
    assert override(recipe, []) is recipe


def test_a_stage_is_named_by_all_that_decides_it() -> None:
    recipe = by_name("vila_smoke")

    def prints(changed: Recipe) -> list[str]:
        before, found = "", []
        for stage in changed.stages:
            before = fingerprint(changed, stage, before)
            found.append(before)
        return found

    base = prints(recipe)
    later = prints(override(recipe, ["stages.pretrain.tune.lm.lr=3e-5"]))
    assert base[0] == later[0]
    assert base[1] != later[1]
    assert base[2] != later[2]
    assert prints(override(recipe, ["stages.align.save_every=3"])) == base
    assert not set(prints(override(recipe, ["seed=1"]))) & set(base)


def test_a_stage_cuts_pictures_larger_for_all_that_come_after_it() -> None:
    for name, sizes in (("qwen_vl_7b", [224, 448, 448]), ("cogvlm_17b", [224, 224, 490, 490])):
        recipe = by_name(name)
        tilings = [recipe.tiling_of(stage) for stage in recipe.stages]
        assert [tiling.size for tiling in tilings] == sizes
        assert recipe.vlm.tower.arch.image == 224  # type: ignore[union-attr]  # whose positions are stretched
    assert [recipe.vlm.layout(tiling).tokens_per_tile for tiling in tilings] == [258, 258, 1227, 1227]
    changed = override(by_name("cogvlm_17b"), ['stages.grounding.tiling={"kind": "pad", "size": 378}'])
    small = tiny(changed)
    assert [SITE.stream(small, stage).tiling.size for stage in small.stages] == [32, 56, 72, 72]
    assert [SITE.stream(small, stage).tiling.kind for stage in small.stages] == ["resize", "pad", "resize", "resize"]
    with pytest.raises(RecipeError, match="tiles of 64 pixels and the encoder takes 96"):
        override(by_name("vila_smoke"), ['stages.sft.tiling={"kind": "resize", "size": 64}'])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('model.connector={"kind": "sva"}', "model: connector 'sva' takes several towers and the encoder has 1; take"),
        ('model.fusion={"kind": "splic"}', "model.fusion: there is no kind 'splic' of it; there are splice, "),
        ("stages.pretrain.tune.lm.lr=-1", "stages.pretrain.tune.lm.lr: Input should be greater than 0 (found -1)"),
        ("model.connector.depth=two", "model.connector.depth: Input should be a valid integer"),
    ],
)
def test_what_does_not_fit_is_told_by_the_path_that_changes_it(change: str, told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        override(by_name("vila_smoke"), [change])
    assert str(refused.value).startswith(told)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean vila_smoke"):
        by_name("vila_smok")


OWN = {
    # what recipes of one file, or made from one another, must not share
    "llava_7b": "arXiv:2304.08485",
    "llava_15_7b": "arXiv:2310.03744",
    "llava_15_7b_lora": "arXiv:2310.03744",
    "llava_next_interleave_7b": "arXiv:2407.07895",
    "openflamingo_9b": "arXiv:2308.01390",
    "otter_9b": "arXiv:2305.03726",
    "idefics_9b": "arXiv:2306.16527",
    "minigpt4_7b": "arXiv:2304.10592",
    "instructblip_7b": "arXiv:2305.06500",
    "bliva_7b": "arXiv:2308.09936",
    "mplug_owl_7b": "arXiv:2304.14178",
    "shikra_7b": "arXiv:2306.15195",
    "kosmos_1": "arXiv:2302.14045",
    "cogvlm2_19b": "arXiv:2408.16500",
    "minicpm_v_20": "arXiv:2408.01800",
    "llava_uhd_13b": "arXiv:2403.11703",
    "vgg16": "arXiv:1409.1556",
    "resnet152": "arXiv:1512.03385",
    "vit_b16": "arXiv:2010.11929",
    "mae_b16": "arXiv:2111.06377",
    "beit_b16": "arXiv:2106.08254",
    "openclip_h14": "arXiv:2212.07143",
}


def test_recipes_name_their_own_papers() -> None:
    """A number, or a venue and its year, for all but those that are no system of anybody's."""
    papers = {name: by_name(name).paper for name in RECIPES}
    assert {name for name, paper in papers.items() if not paper} == {"vila_smoke", "vila_real"}
    wrong = {
        name: paper
        for name, paper in papers.items()
        if not re.fullmatch(r"(arXiv:\d{4}\.\d{4,5}|[^:]+ \d{4}.*)?", paper)
    }
    assert not wrong
    assert {name: papers[name] for name in OWN} == OWN
