"""Single streams: what transformers' ViLT computes, pair by pair; objectives that know the step and not its packs."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import on_ranks
from cluster.engines import alone, build_engine
from cluster.site import Site
from mllm.objectives import MaskedTokens, Matching, Sum, Term
from mllm.recipe import FSDP, Recipe, Source, Steps
from mllm.recipes import by_name
from mllm.streams import PairEncoder, SingleStream
from ops.images import normalize
from ops.transport import plan, transport_cost
from pipelines.corpora import Pairs, TextOnly
from pipelines.types import Batch, Pack, Sample
from pipelines.windows import PackWindows


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    full = by_name("vilt_b32")
    model = full.model.tiny()
    stage = replace(
        full.stages[0],
        mixture=(Source(corpus=Pairs(name="example-pairs")), Source(corpus=TextOnly(name="example-text"))),
        context=192,
        tokens_per_step=6 * 192,
        max_tiles=6,
        window=32,
        chunk=8,
        duration=Steps(count=2),
        parallel=FSDP(dtype="float32", recompute="none"),
    )
    return replace(full, model=model, tiling=replace(full.tiling, size=32), stages=(stage,))


def model_of(recipe: Recipe) -> PairEncoder:
    torch.manual_seed(0)
    model = recipe.model.build()
    assert isinstance(model, PairEncoder)
    return model


def samples_of(site: Site, recipe: Recipe) -> tuple[PackWindows, list[Sample]]:
    windows = PackWindows(site.stream(recipe, recipe.stages[0]))
    samples, _ = windows.samples(windows.rows(0))
    return windows, samples


def spread(samples: list[Sample], windows: PackWindows, ways: int) -> list[Pack]:
    groups = [samples[n::ways] for n in range(ways)]
    return [Pack.of_samples(group, windows.pixels(group)) for group in groups]


def test_it_fuses_as_transformers_does(site: Site, recipe: Recipe) -> None:
    from transformers import ViltForMaskedLM

    model = model_of(recipe).eval()
    assert isinstance(recipe.model, SingleStream)
    theirs = ViltForMaskedLM(recipe.model.arch.config()).eval()
    theirs.load_state_dict(model.net.state_dict())
    windows, samples = samples_of(site, recipe)
    pictured, plain = [s for s in samples if s.tiles][:3], [s for s in samples if not s.tiles][:2]
    mixed = [pictured[0], plain[0], pictured[1], plain[1], pictured[2]]
    batch = Batch.of(Pack.of_samples(mixed, windows.pixels(mixed)))
    paired = model.pairs(batch)
    assert paired.texts.documents.tolist() == [0, 2, 4]
    fused = model.fuse(batch, paired)
    pixels = normalize(batch.tiles, model.mean, model.std)
    lengths = paired.texts.cu_seqlens.diff().tolist()
    for place, ids in enumerate(paired.texts.ids.split(lengths)):
        torch.manual_seed(0)
        with torch.no_grad():
            # Their picture embedding draws the order of patches; undo it by asking for the embedding itself.
            embed = theirs.vilt.embeddings
            x = embed.patch_embeddings(pixels[place : place + 1]).flatten(2).transpose(1, 2)
            x = torch.cat([embed.cls_token, x], dim=1) + embed.position_embeddings
            mask = torch.ones(1, x.shape[1], dtype=torch.long)
            output = theirs.vilt(input_ids=ids[None], image_embeds=x, pixel_mask=mask)
        hidden = output.last_hidden_state[0]
        torch.testing.assert_close(fused.texts.split(lengths)[place], hidden[: len(ids)], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.pictures[place], hidden[len(ids) :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.pooled[place], output.pooler_output[0], rtol=1e-4, atol=1e-4)


def test_masked_words_are_the_rows_own(site: Site, recipe: Recipe) -> None:
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    chosen = [s for s in samples if s.tiles][:6]
    objective = MaskedTokens(share=0.4)
    together = objective(model, Batch.of(Pack.of_samples(chosen, windows.pixels(chosen))))
    assert 5 < float(together.weight) == float(together.documents[:, 1].sum())
    for place, sample in enumerate(chosen):
        batch = Batch.of(Pack.of_samples([sample], windows.pixels([sample])))
        output = objective(model, batch)
        torch.testing.assert_close(together.documents[place], output.documents[0], rtol=1e-4, atol=1e-4)
        masked = objective.masked(batch, model.pairs(batch))
        assert not masked[0]
        assert not masked[-1]
        assert float(objective.counted(model, batch)) == float(output.weight)


def test_torn_pairs_get_another_pairs_text(site: Site, recipe: Recipe) -> None:
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    chosen = [s for s in samples if s.tiles][:12]
    objective = Matching()

    def told(ways: int) -> set[tuple[int, tuple[int, ...], bool]]:
        packs = spread(chosen, windows, ways)
        collected = [objective.collect(model, Batch.of(pack)) for pack in packs]
        rows = objective.whole(collected, None)
        seeds = [seed for pack in collected for seed in pack[1].tolist()]
        return {(seed, tuple(words), right) for seed, (words, right) in zip(seeds, chain(*rows), strict=True)}

    once = told(1)
    assert once == told(3)
    texts = {tuple(i for i in s.input_ids.tolist() if i >= 0) for s in chosen}
    assert {words for _, words, _ in once} <= {(*t[:23], t[-1]) if len(t) > 24 else t for t in texts}
    assert 2 <= sum(right for _, _, right in once) <= 10


OBJECTIVES = {
    "matching": Matching(alignment=0.3),
    "sum": Sum(terms=(Term(objective=MaskedTokens(), weight=2.0), Term(objective=Matching(), weight=0.5))),
}


def steps(recipe: Recipe, site: Site, kind: str, turns: int) -> list[tuple[float, float]]:
    windows, samples = samples_of(site, recipe)
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = replace(recipe.stages[0], objective=OBJECTIVES[kind])
    engine = build_engine(model_of(recipe), stage, 2, torch.device("cpu"))
    reports = []
    for step in range(2):
        packs = spread(samples[step * 20 : step * 20 + 20], windows, turns * world)
        report = engine.train_step(packs[rank::world], 1.0)
        assert report.taken
        reports.append((report.loss, report.grad_norm))
    return reports


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_curve_knows_neither_turns_nor_ranks(site: Site, recipe: Recipe, kind: str) -> None:
    with alone():
        once = steps(recipe, site, kind, 1)
        thrice = steps(recipe, site, kind, 3)
    assert thrice == [pytest.approx(pair, rel=2e-4) for pair in once]
    for reports in on_ranks(2, steps, recipe, site, kind, 2):
        assert reports == [pytest.approx(pair, rel=2e-4) for pair in once]


def test_a_sum_is_the_sum_of_means(site: Site, recipe: Recipe) -> None:
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    batch = Batch.of(Pack.of_samples(samples[:14], windows.pixels(samples[:14])))
    words, match = MaskedTokens()(model, batch), Matching()(model, batch)
    total = OBJECTIVES["sum"](model, batch)
    expected = 2 * words.sum / words.weight + 0.5 * match.sum / match.weight
    assert (total.sum / total.weight).item() == pytest.approx(expected.item(), rel=1e-5)
    assert total.weight.item() == words.weight.item()
    assert (total.documents[:, 0].sum() / total.weight).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_transport_plan_moves_all_of_the_words_to_all_of_the_patches() -> None:
    torch.manual_seed(0)
    there = torch.tensor([[True] * 5 + [False], [True, False, True, True, False, False]])
    cost = torch.rand(2, 6, 4)
    moved = plan(cost, there)
    assert torch.allclose(moved.sum(2), there / there.sum(1, keepdim=True), atol=1e-3)
    assert torch.allclose(moved.sum(1), torch.full((2, 4), 0.25), atol=1e-3)


def test_transport_finds_the_pairs_that_are_alike() -> None:
    """Four orthogonal vectors in another order: the least cost is nothing, the order is the plan, and the gradient its slope."""
    order = torch.tensor([2, 0, 3, 1])
    left = torch.eye(4)[None].clone().requires_grad_()
    right = torch.eye(4)[order][None]
    cost = transport_cost(left, right, torch.ones(1, 4, dtype=torch.bool))
    assert cost.item() == pytest.approx(0, abs=1e-3)
    moved = plan(1 - torch.eye(4)[order].T[None], torch.ones(1, 4, dtype=torch.bool))
    assert moved[0].argmax(1).tolist() == order.argsort().tolist()
    cost.sum().backward()
    assert left.grad is not None


def half(recipe: Recipe, site: Site, kind: str) -> tuple[float, float]:
    """One step in bfloat16 with everything computed again, where the second rank has nothing."""
    windows, samples = samples_of(site, recipe)
    parallel = FSDP(dtype="bfloat16", recompute="full")
    stage = replace(recipe.stages[0], objective=OBJECTIVES[kind], parallel=parallel)
    engine = build_engine(model_of(recipe), stage, 2, torch.device("cpu"))
    mine = samples[:6] if dist.get_rank() == 0 else []
    pack = Pack.of_samples(mine, windows.pixels(mine)) if mine else Pack.empty((3, 32, 32))
    report = engine.train_step([pack], 1.0)
    assert report.taken
    return report.loss, report.grad_norm


def test_a_rank_with_nothing_hangs_nobody(site: Site, recipe: Recipe) -> None:
    ours, theirs = on_ranks(2, half, recipe, site, "sum")
    assert ours == theirs
    with alone():
        assert half(recipe, site, "sum") == pytest.approx(ours, rel=0.05)
