"""What a plan says a run would cost, held against what runs have cost; and what it warns of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster import cost, planned
from cluster.amounts import quantity
from cluster.cli import main
from cluster.doubts import doubts
from cluster.metrics import RunFolder, StepRecord
from cluster.published import CORPORA
from cluster.site import Site
from mllm.recipe import Cosine, Epochs, Full, LoRA, Recipe, Steps, Tokens, dump, override
from mllm.recipes import RECIPES, by_name
from mllm.tiny import tiny
from tests.conftest import ROOT

EXAMPLE = str(ROOT / "examples" / "site.toml")


def test_vila_costs_what_its_authors_paid() -> None:
    """128 A100 for some 40 hours, 5.1 thousand GPU-hours (arXiv:2312.07533): within bars that say something."""
    run = cost.cost(by_name("vila_7b"), Site(), cost.assumed("a100"), price=2.0)
    low, high = run.hours
    assert run.whole
    assert low < 5100 < high
    assert high < 2 * low
    assert run.money == (2 * low, 2 * high)
    assert max(run.stages, key=lambda stage: stage.hours or (0, 0)).name == "pretrain"


def test_llava_costs_what_its_authors_paid() -> None:
    """8 A100 for 3.5 and 10 hours, 108 GPU-hours (its README); each stage's bars hold its own."""
    recipe = by_name("llava_15_7b")
    run = cost.cost(recipe, Site(), cost.assumed("a100"))
    for stage, hours in zip(run.stages, (3.5 * 8, 10 * 8), strict=True):
        assert stage.hours is not None
        assert stage.hours[0] < hours < stage.hours[1]


@pytest.mark.parametrize(
    ("duration", "tokens"),
    [(Tokens(count=10**9), (10**9, 10**9)), (Steps(count=100), (0.9 * 16_000_000, 16_000_000))],
)
def test_a_duration_in_tokens_or_steps_says_how_many(duration: Tokens | Steps, tokens: tuple[float, float]) -> None:
    recipe = by_name("vila_7b")
    stage = replace(recipe.stages[0], duration=duration)
    shape = cost.shape_of(recipe, stage, Site())
    assert not isinstance(shape, str)
    assert shape.tokens == pytest.approx(tokens, rel=0.02)
    assert shape.tiles[0] == pytest.approx(shape.tokens[0] / 600, rel=0.1)  # 576 of a picture and a caption


def test_what_is_on_the_site_is_looked_at(recipe: Recipe, site: Site) -> None:
    """Two epochs are twice one, and the rows are the site's own."""
    stage = replace(recipe.stage("pretrain"), duration=Epochs(count=1))
    once = cost.shape_of(recipe, stage, site)
    twice = cost.shape_of(recipe, replace(stage, duration=Epochs(count=2)), site)
    assert not isinstance(once, str)
    assert not isinstance(twice, str)
    assert twice.tokens == pytest.approx((2 * once.tokens[0], 2 * once.tokens[1]))
    assert any(source.startswith("example-pages: the site's") for source in once.sources)


def test_two_answers_of_a_row_are_two_documents(site: Site) -> None:
    recipe = tiny(by_name("vila_15_3b"))
    stage = replace(recipe.stage("dpo"), duration=Epochs(count=1))
    shape = cost.shape_of(recipe, stage, site)
    assert not isinstance(shape, str)
    assert shape.documents == 2 * site.stream(recipe, stage).order.rows


def test_a_corpus_nobody_knows_is_named() -> None:
    run = cost.cost(by_name("flamingo_3b"), Site(), cost.assumed("a100"))
    assert not run.whole
    assert "is not known here" in run.stages[0].why or "are not known here" in run.stages[0].why
    assert not cost.lines(run, (8,))[-1].startswith("  on 8 GPUs")


def test_published_sizes_are_of_corpora_that_recipes_read() -> None:
    read = {source.corpus.name for make in RECIPES.values() for stage in make().stages for source in stage.mixture}
    for corpus in CORPORA:
        assert corpus.name in read
        assert corpus.source
        assert all(0 <= low <= high for low, high in (corpus.rows, corpus.text, corpus.pictures))


def step(number: int, seconds: float) -> StepRecord:
    return StepRecord(
        step=number, progress=number / 20, loss=1.0, grad_norm=1.0, lr=1e-3, tokens=2000, learned=1000, images=1, rows=1,
        fill=1.0, imbalance=1.0, seconds=seconds, data_wait=0.0, world=2, time=0.0, sources=(), packs=(),
        flops=1e12, hardware_flops=1.2e12, peak=1e13,
    )  # fmt: skip


def test_the_speed_is_a_runs_own(recipe: Recipe, site: Site, tmp_path: Path) -> None:
    """Its first steps, in which things compile, count for nothing."""
    folder = RunFolder(tmp_path / "runs" / "done")
    folder.recipe.write(dump(recipe).encode())
    for number in range(1, 21):
        folder.write_step("align", step(number, 60.0 if number < 4 else 1.0 + number % 2))
    folder.flush_steps()
    speed = planned.speed_of(site, "a100", "0.4", "done")
    assert speed.flops == (0.3e12, 0.6e12)
    assert speed.tokens == (500, 1000)
    assert "17 steps of run done" in speed.source
    RunFolder(tmp_path / "runs" / "new").recipe.write(dump(recipe).encode())
    with pytest.raises(ValueError, match="fewer than two of its steps tell FLOPs"):
        planned.speed_of(site, "a100", "0.4", "new")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "tpu"], "--gpu tpu"),
        (["--mfu", "0.5-0.4"], "from its least to its most"),
        (["--mfu", "40%"], "expected a share or two"),
        (["--price", "-1"], "--price -1"),
        (["--from", "no-such"], "no run 'no-such'"),
        (["--diff", "vila_8b"], "did you mean"),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "vila_smoke", "--site", EXAMPLE, *words])
    assert told in capsys.readouterr().err


def test_the_command_tells_cost_and_days(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "vila_smoke", "--site", EXAMPLE, "--gpu", "h100", "--mfu", "0.4", "--price", "3"])
    told = capsys.readouterr().out
    assert "cost by assumed: 40% to 40% of H100's 989 TFLOP/s" in told
    assert "at 3 an hour" in told
    assert "on 128 GPUs" in told


def test_a_difference_tells_values_and_what_comes_of_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = by_name("vila_smoke")
    wider = override(recipe, ["name=wider", "model.lm.arch.intermediate_size=4096"])
    (tmp_path / "wider.json").write_text(dump(wider))
    main(["plan", "vila_smoke", "--site", EXAMPLE, "--diff", str(tmp_path / "wider.json")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    before = str(recipe.vlm.lm.arch.intermediate_size)
    assert ["model.lm.arch.intermediate_size", before, "4096"] in rows
    told = {row[0]: row for row in rows if row}
    counts = [sum(p.numel() for p in one.vlm.meta().parameters()) for one in (recipe, wider)]
    assert told["parameters"][1:] == [quantity(count) for count in counts]
    assert "GPU-hours" in told
    assert "tokens" not in told  # of which there are as many
    (tmp_path / "same.json").write_text(dump(recipe))
    main(["plan", "vila_smoke", "--site", EXAMPLE, "--diff", str(tmp_path / "same.json")])
    assert capsys.readouterr().out == "vila_smoke and vila_smoke are the same\n"


def changed(recipe: Recipe, **what: object) -> Recipe:
    return replace(recipe, stages=(*recipe.stages[:-1], replace(recipe.stages[-1], **what)))  # type: ignore[arg-type]  # of fields


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ({"tune": {"lm": Full(lr=3e-3)}}, "sft: lm is trained at lr 0.003, above the usual"),
        ({"tune": {"lm": LoRA(lr=1e-6)}}, "below the usual 1e-05 to 0.002 of LoRA"),
        ({"schedule": Cosine(warmup=1.0)}, "the warm-up lasts as long as the stage"),
        ({"schedule": Cosine(warmup=0.5)}, "the warm-up takes 50% of the stage"),
        ({"duration": Steps(count=10), "save_every": 100}, "a fault begins it anew"),
        ({"max_tiles": 2}, "the tile budget is scarce: 2 tiles make 1,152 of 4,096 tokens"),
        ({"tokens_per_step": 4096}, "a step has 1 pack and there are 8 workers, so 7 of them do nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_unlikely_is_said(what: dict[str, object], told: str) -> None:
    recipe = by_name("vila_7b")
    before = doubts(recipe, 8)
    after = doubts(changed(recipe, **what), 8)
    assert not any(told in words for words in before)
    assert any(told in words for words in after), after


def test_pictures_that_no_pack_holds_are_said() -> None:
    recipe = by_name("llava_next_7b")
    few = changed(recipe, context=1024, tokens_per_step=65_536)
    assert any("rows with such are dropped; raise context" in words for words in doubts(few, 8))
    few = changed(recipe, max_tiles=3)
    assert any("rows with such are dropped; raise max_tiles" in words for words in doubts(few, 8))


def test_a_stage_without_text_is_said_to_cost_text_skill() -> None:
    recipe = by_name("vila_7b")
    assert not any("text skill" in words for words in doubts(recipe, 8))
    assert any("text skill" in words for words in doubts(changed(recipe, mixture=recipe.stages[-1].mixture[:1]), 8))


def test_recipes_here_are_not_doubted_for_their_rates() -> None:
    """Ranges that papers' own rates fall out of would teach people to look away."""
    odd = [
        (name, words) for name, make in RECIPES.items() for words in doubts(make(), 8) if "is trained at lr" in words
    ]
    assert not odd
