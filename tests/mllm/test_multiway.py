"""Multiway transformers: who goes through which expert, what packs know of each other, what each stage trains."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import on_ranks
from cluster.engines import alone, build_engine
from cluster.site import load_site
from mllm.aligned import unfilled
from mllm.chance import tile_seeds
from mllm.depth import branch_factors
from mllm.dual import Layers
from mllm.multiway import Multiway, MultiwayEncoder
from mllm.objectives import HardMatching, MaskedData
from mllm.recipe import FSDP, Recipe, Source
from mllm.recipes import by_name
from mllm.tiny import tiny
from mllm.tune import apply_tuning
from pipelines.corpora import Labelled, Pairs, TextOnly
from pipelines.types import Batch, Pack, Sample
from pipelines.windows import PackWindows
from tests.conftest import ROOT

SITE = load_site(str(ROOT / "examples" / "site.toml"))
NAMES = ("vlmo_base", "vl_beit_base", "beit3_base")


@cache
def small(name: str, **words: Any) -> Recipe:
    recipe = tiny(by_name(name))
    return replace(recipe, model=replace(recipe.model, **words))


def built(recipe: Recipe) -> MultiwayEncoder:
    torch.manual_seed(0)
    model = recipe.model.build()
    assert isinstance(model, MultiwayEncoder)
    return model


@cache
def samples() -> tuple[PackWindows, dict[str, list[Sample]]]:
    """Rows of pictures, of texts and of pairs."""
    recipe = small("vl_beit_base")
    corpora = (Labelled(name="example-shapes"), TextOnly(name="example-text"), Pairs(name="example-pairs"))
    stage = replace(recipe.stages[0], mixture=tuple(Source(corpus=corpus, weight=1.0) for corpus in corpora), window=48)
    windows = PackWindows(SITE.stream(recipe, stage))
    found, _ = windows.samples(windows.rows(0))
    kinds = ("pictures", "texts", "pairs")
    return windows, {kind: [s for s in found if s.source == number] for number, kind in enumerate(kinds)}


def batch_of(chosen: list[Sample]) -> Batch:
    windows, _ = samples()
    return Batch.of(Pack.of_samples(chosen, windows.pixels(chosen)) if chosen else Pack.empty((3, 96, 96)))


def mixed() -> list[Sample]:
    _, kinds = samples()
    rows = zip(kinds["pictures"][:2], kinds["texts"][:2], kinds["pairs"][:2], strict=True)
    return [sample for row in rows for sample in row]


def loss_of(model: MultiwayEncoder, batch: Batch, objective: MaskedData | None = None) -> Any:
    return (objective or MaskedData())(model, batch)


@pytest.mark.parametrize(("name", "millions"), [("vlmo_base", 175), ("vlmo_large", 562), ("beit3_giant", 1900)])
def test_it_is_as_large_as_its_paper_says(name: str, millions: int) -> None:
    """Without heads and tokenizer, which are thrown away after pre-training."""
    parts = by_name(name).model.meta().parts()
    body = sum(p.numel() for part in ("vision", "language", "fused", "attention") for p in parts[part])
    assert body / 1e6 == pytest.approx(millions, rel=0.035)


def test_the_giants_parts_are_those_of_its_table() -> None:
    """BEiT-3, table 2: attention 317 million, experts 692 each, 52 of both."""
    parts = by_name("beit3_giant").model.meta().parts()
    spec = by_name("beit3_giant").model
    assert isinstance(spec, Multiway)
    embedded = spec.vocab_size * spec.shape.hidden_size
    found = {name: sum(p.numel() for p in parts[name]) / 1e6 for name in ("attention", "vision", "language", "fused")}
    assert found["attention"] == pytest.approx(317, abs=1)
    assert found["vision"] == pytest.approx(692, abs=2.5)
    assert found["language"] - embedded / 1e6 == pytest.approx(692, abs=1.5)
    assert found["fused"] == pytest.approx(52, abs=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_document_in_a_pack_is_the_document_alone(name: str) -> None:
    model = built(small(name, drop_path=0.5)).train()
    chosen = mixed()
    together = loss_of(model, batch_of(chosen))
    assert float(together.weight) == float(together.documents[:, 1].sum())
    for place, sample in enumerate(chosen):
        alone = loss_of(model, batch_of([sample]))
        # Four means of a pack are not those of a document, but which words are right and how many there are is its own.
        torch.testing.assert_close(together.documents[place, 1:], alone.documents[0, 1:])
    whole = model.whole(batch_of(chosen))
    assert whole.paired.tolist() == [False, False, True] * 2
    masks = MaskedData().masks(model, batch_of(chosen), whole)
    words, patches = model.read(batch_of(chosen), whole, masks.patches)
    one = batch_of(chosen[5:])
    words_alone, patches_alone = model.read(one, model.whole(one), masks.patches[3:])
    torch.testing.assert_close(words[whole.texts.owner == 3], words_alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patches[3:], patches_alone, rtol=1e-4, atol=1e-5)


def test_pairs_are_seen_whole_for_matching_and_apart_for_contrast() -> None:
    model = built(small("vlmo_base")).eval()
    first, second = samples()[1]["pairs"][:2]
    batch = batch_of([first, second])
    paired = model.pairs(batch)
    swapped = replace(paired, tiles=paired.tiles.flip(0))
    assert not torch.allclose(model.fuse(batch, paired).pooled, model.fuse(batch, swapped).pooled, atol=1e-5)
    pairs = model.embedded(batch)
    alone = model.embedded(batch_of([second]))
    torch.testing.assert_close(pairs.images[1], alone.images[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pairs.texts[1], alone.texts[0], rtol=1e-4, atol=1e-5)
    tile = batch.tiles.clone()
    tile[paired.tiles[1]] = 0
    torch.testing.assert_close(model.embedded(replace(batch, tiles=tile)).texts, pairs.texts)


def test_texts_that_look_alike_are_asked_about_on_the_rank_of_their_picture() -> None:
    """VLMo's hard negatives: of each picture another's text, of each text another's picture, and each pair itself."""
    model, objective = built(small("vlmo_base")).eval(), HardMatching()
    pairs = samples()[1]["pairs"][:4]
    batch = batch_of([pairs[0], samples()[1]["texts"][0], *pairs[1:]])
    (asked,) = objective.whole([objective.collect(model, batch)], None)
    assert asked.belongs.tolist() == [1] * 4 + [0] * 8
    scores = model.matched(batch, asked.pairs, unfilled(asked.ids, asked.seeds))
    own = model.fuse(batch, model.pairs(batch)).pooled
    torch.testing.assert_close(scores[:4], model.match(own)[asked.pairs[:4]], rtol=1e-4, atol=1e-5)
    output: Any = objective(model, batch)
    assert float(output.weight) == 4
    assert output.documents[:, 1].tolist() == [1, 0, 1, 1, 1]
    nothing: Any = objective(model, batch_of(samples()[1]["texts"][:2]))
    assert float(nothing.weight) == 0
    nothing.sum.backward()


def test_positions_go_through_the_experts_of_what_they_are() -> None:
    """Change an expert's weights: only who goes through it notices."""
    model = built(small("vlmo_base")).eval()
    _, kinds = samples()
    batch = batch_of([kinds["pictures"][0], kinds["texts"][0], kinds["pairs"][0]])
    whole = model.whole(batch)

    @torch.no_grad()
    def states() -> dict[str, torch.Tensor]:
        words, patches = model.read(batch, whole)
        owner = whole.texts.owner
        return {"text": words[owner == 0], "pair": words[owner == 1], "picture": patches[0], "pictured": patches[1]}

    before = states()
    last: Any = model.layers[-1]
    for expert, seen in ((last.language, {"text"}), (last.vision, {"picture"}), (last.both, {"pair", "pictured"})):
        kept = expert.up.bias.data.clone()
        expert.up.bias.data.add_(1.0)
        after = states()
        assert {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)} == seen
        expert.up.bias.data.copy_(kept)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_exactly_where_each_stage_says(name: str) -> None:
    """Whatever a pack holds: everything, one kind alone, nothing."""
    recipe = small(name)
    _, kinds = samples()
    for stage in recipe.stages:
        model = built(recipe).train()
        groups = apply_tuning(model, stage.tune)
        trained = {id(p) for group in groups for p in group.parameters}
        objective: Any = stage.objective
        for chosen in (mixed(), kinds["pictures"][:2], kinds["texts"][:2], kinds["pairs"][:2], []):
            model.zero_grad()
            output = objective(model, batch_of(chosen))
            output.sum.backward()
            assert torch.isfinite(output.sum)
            wrong = [n for n, p in model.named_parameters() if (p.grad is not None) != (id(p) in trained)]
            assert wrong == [], (stage.name, len(chosen))


def test_vlmos_text_stage_leaves_all_that_pictures_taught() -> None:
    recipe = by_name("vlmo_base")
    model = recipe.model.meta()
    names = {n for group in apply_tuning(model, recipe.stage("text").tune) for n in group.names}
    assert all("language" in n or n.startswith(("word_", "to_words")) for n in names)
    assert sum("language" in n for n in names) == 12 * 6


def test_a_loss_is_the_sum_of_four_means_however_packs_are_spread() -> None:
    model = built(small("beit3_base")).eval()
    chosen = mixed()
    objective = MaskedData()
    whole = loss_of(model, batch_of(chosen))
    parts = [batch_of(chosen[:1]), batch_of(chosen[1:4]), batch_of(chosen[4:])]
    told = objective.whole([objective.collect(model, part) for part in parts], None)
    outputs = [objective.again(model, part, each) for part, each in zip(parts, told, strict=True)]
    assert sum(float(o.weight) for o in outputs) == float(whole.weight)
    assert sum(o.sum.item() for o in outputs) == pytest.approx(whole.sum.item(), rel=1e-5)
    means = []
    for kind in (chosen[0::3], chosen[1::3]):  # of pictures alone and of texts alone each mean is the whole loss
        output = loss_of(model, batch_of(kind))
        means.append((output.sum / output.weight).item())
    pairs = batch_of(chosen[2::3])
    (weights,) = objective.collect(model, pairs)
    assert (weights > 0).tolist() == [False, True, False, True]
    output = loss_of(model, pairs)
    means.append((output.sum / output.weight).item())
    assert (whole.sum / whole.weight).item() == pytest.approx(sum(means), rel=1e-4)


def test_more_is_masked_of_a_text_that_has_a_picture() -> None:
    model = built(small("vl_beit_base"))
    _, kinds = samples()
    objective = MaskedData(words=0.1, paired_words=0.9, patches=0.4)
    batch = batch_of([*kinds["texts"][:4], *kinds["pairs"][:8]])
    whole = model.whole(batch)
    masks = objective.masks(model, batch, whole)
    paired = whole.paired[whole.texts.documents][whole.texts.owner]
    assert float(masks.words[paired].float().mean()) > 0.6 > 0.3 > float(masks.words[~paired].float().mean())
    assert masks.patches.sum(1).max() <= 14


def test_branches_are_left_out_in_training_alone_and_by_row() -> None:
    recipe = small("vlmo_base", drop_path=0.9)
    model = built(recipe)
    batch = batch_of(samples()[1]["pairs"][:4])
    paired = model.pairs(batch)
    with torch.no_grad():
        trained, again = (model.train().fuse(batch, paired).pooled for _ in range(2))
        still = model.eval().fuse(batch, paired).pooled
        assert torch.equal(trained, again)
        assert not torch.allclose(trained, still, atol=1e-5)
        never = built(replace(recipe, model=replace(recipe.model, drop_path=0.0))).train()
        assert torch.equal(never.fuse(batch, paired).pooled, still)


def test_as_many_branches_are_left_out_as_is_said() -> None:
    factors = branch_factors(torch.arange(4000), 5, 0.4)
    assert factors.shape == (4000, 10)
    assert (factors[:, :2] == 1).all()
    for layer in range(5):
        share = 0.1 * layer
        left = (factors[:, 2 * layer : 2 * layer + 2] == 0).float().mean()
        assert float(left) == pytest.approx(share, abs=0.02)
    assert factors.mean(0).sub(1).abs().max() < 0.06
    assert branch_factors(torch.tensor([7]), 5, 0.4).equal(factors[7:8])


def test_tiles_of_a_row_have_seeds_of_their_own() -> None:
    batch = batch_of(samples()[1]["pairs"][:3])
    seeds = tile_seeds(batch)
    assert len(set(seeds.tolist())) == 3
    assert batch.seeds is not None
    assert seeds.equal(batch.seeds * 4096)


def test_what_does_not_fit_is_refused() -> None:
    shape = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    with pytest.raises(ValueError, match="fused=3 layers at the top of 2"):
        Multiway(shape=shape, fused=3, tokenizer="t")
    with pytest.raises(ValueError, match="none of the 100 words"):
        Multiway(shape=shape, fused=1, tokenizer="t", vocab_size=100)
    recipe = small("beit3_base")
    with pytest.raises(ValueError, match="cannot learn 'masked_data'"):
        replace(recipe, model=replace(recipe.model, codebook=None))


def steps(names: tuple[str, ...]) -> list[tuple[float, float]]:
    """Loss and gradient norm of two steps of each recipe's last stage, each of two packs of different kinds."""
    windows, kinds = samples()
    rank, world = dist.get_rank(), dist.get_world_size()
    reports = []
    for name in names:
        recipe = small(name)
        stage = replace(recipe.stages[-1], parallel=FSDP(dtype="float32", recompute="full"))
        engine = build_engine(built(recipe), stage, 3, torch.device("cpu"))
        for mine in ((kinds["pictures"][:3], kinds["texts"][:3]), (kinds["pairs"][:4], [])):
            packs = [Pack.of_samples(each, windows.pixels(each)) if each else Pack.empty((3, 96, 96)) for each in mine]
            report = engine.train_step(packs[rank::world], 1.0)
            assert report.taken
            reports.append((report.loss, report.grad_norm))
    return reports


def test_ranks_with_texts_and_ranks_with_pictures_end_their_step_together() -> None:
    names = ("vlmo_base", "beit3_base")
    with alone():
        once = steps(names)
    for reports in on_ranks(2, steps, names):
        assert reports == [pytest.approx(pair, rel=2e-4) for pair in once]
