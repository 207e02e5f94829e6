"""Encoders of texts with regions: what transformers' LXMERT computes, each pair as if alone, and what is hidden stays hidden."""

import math
from dataclasses import replace
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import on_ranks
from cluster.engines import alone, build_engine
from cluster.preview import cut_of, write_preview
from cluster.site import Site
from mllm.bert import CrossEncoder
from mllm.objectives import AtOnce, Classification, Contrastive, MaskedRegions, MaskedTokens, Matching, OneOf, Sum, Term
from mllm.recipe import FSDP, Full, Recipe, RecipeError, override
from mllm.recipes import by_name
from mllm.regions import geometry, regions_of, waves
from mllm.streams import with_texts
from mllm.tiny import tiny
from mllm.tune import apply_tuning
from ops.transport import plan, transport_cost
from pipelines.objects import Objects
from pipelines.types import Batch, Pack, Sample
from pipelines.windows import PackWindows

NAMES = ("uniter_base", "vl_bert_base", "pixel_bert_r50", "lxmert")


def model_of(recipe: Recipe, seed: int = 0) -> CrossEncoder:
    torch.manual_seed(seed)
    model = recipe.model.build()
    assert isinstance(model, CrossEncoder)
    with torch.no_grad():  # so that nothing is zero, and attention is no mean
        for name, p in model.named_parameters():
            if "norm" not in name.lower() and not name.startswith("tower"):
                p.copy_(torch.randn_like(p) * 0.15)
    return model.eval()


def samples_of(site: Site, recipe: Recipe) -> tuple[PackWindows, list[Sample]]:
    windows = PackWindows(site.stream(recipe, recipe.stages[0]))
    samples, dropped = windows.samples(windows.rows(0))
    assert not dropped
    return windows, samples


def batch_of(windows: PackWindows, samples: list[Sample]) -> Batch:
    return Batch.of(Pack.of_samples(samples, windows.pixels(samples)))


@torch.no_grad()
def test_lxmert_computes_what_transformers_does(site: Site) -> None:
    from transformers import LxmertForPreTraining

    recipe = tiny(by_name("lxmert"))
    model: Any = model_of(recipe)
    spec: Any = recipe.model
    theirs = LxmertForPreTraining(spec.arch.config(spec.answers)).eval()
    theirs.load_state_dict(model.net.state_dict())
    windows, samples = samples_of(site, recipe)
    chosen = [samples[0], samples[-1], samples[1]]
    batch = batch_of(windows, chosen)
    paired = model.pairs(batch)
    fused = model.fuse(batch, paired)
    seen = regions_of(batch.tiles, spec.arch.row)
    lengths, counts = paired.texts.cu_seqlens.diff().tolist(), paired.counts.tolist()
    assert counts == [sample.tiles for sample in chosen]
    first = 0
    for place, (ids, count) in enumerate(zip(paired.texts.ids.split(lengths), counts, strict=True)):
        mine = slice(first, first + count)
        out = theirs(
            input_ids=ids[None],
            visual_feats=seen.features[None, mine],
            visual_pos=seen.boxes[None, mine],
            attention_mask=torch.ones(1, len(ids)),
        )
        inner = theirs.lxmert(
            input_ids=ids[None], visual_feats=seen.features[None, mine], visual_pos=seen.boxes[None, mine]
        )
        close(fused.texts.split(lengths)[place], inner.language_output[0])
        close(fused.pictures[mine], inner.vision_output[0])
        close(fused.pooled[place], inner.pooled_output[0])
        close(model.words_of(fused.texts.split(lengths)[place]), out.prediction_logits[0])
        close(model.match(fused.pooled)[place], out.cross_relationship_score[0])
        close(model.scores(batch).logits[place], out.question_answering_score[0])
        first += count


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_pair_in_a_pack_is_as_it_is_alone(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    chosen = [*[s for s in samples if s.tiles][:3], *[s for s in samples if not s.tiles][:1]]
    chosen = [chosen[0], *chosen[3:], *chosen[1:3]]
    batch = batch_of(windows, chosen)
    paired = model.pairs(batch)
    fused = model.fuse(batch, paired)
    lengths = paired.texts.cu_seqlens.diff().tolist()
    kept = [chosen[n] for n in paired.texts.documents.tolist()]
    assert len(kept) == (len(chosen) if name == "vl_bert_base" else 3)
    runs = fused.pictures.split([len(fused.pictures) // 3] * 3)  # all of as many regions or cells
    shown = 0
    for place, sample in enumerate(kept):
        single = batch_of(windows, [sample])
        own = model.fuse(single, model.pairs(single))
        close(fused.texts.split(lengths)[place], own.texts)
        close(fused.pooled[place], own.pooled[0])
        if sample.tiles:
            close(runs[shown], own.pictures)
            shown += 1
    assert shown == 3


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pixel_bert_r50"])
@torch.no_grad()
def test_what_a_hidden_region_shows_nobody_knows_and_others_matter(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    chosen = [s for s in samples if s.tiles][:2]
    batch = batch_of(windows, chosen)
    paired = model.pairs(batch)
    hidden = torch.zeros(len(paired.tiles), dtype=torch.bool)
    hidden[2] = True
    row = recipe.tiling.row  # type: ignore[union-attr]  # objects
    other = batch.tiles.clone()
    other[2, : 2 * row.halves] = other[9, : 2 * row.halves]  # another's features and classes, the box its own
    changed = replace(batch, tiles=other)

    def pictures(batch: Batch, hidden: Tensor) -> Tensor:
        return model.fuse(batch, replace(model.pairs(batch), hidden=hidden)).pictures

    close(pictures(batch, hidden), pictures(changed, hidden))
    assert (pictures(batch, ~hidden) - pictures(changed, ~hidden)).abs().max() > 1e-3
    moved = batch.tiles.clone()
    moved[2, 2 * row.halves :] = moved[7, 2 * row.halves :]
    far = pictures(replace(batch, tiles=moved), hidden)
    assert (pictures(batch, hidden)[2] - far[2]).abs().max() > 1e-3  # where it is, is known


def test_regions_travel_through_bytes_as_they_were_found(site: Site) -> None:
    recipe = tiny(by_name("lxmert"))
    windows, samples = samples_of(site, recipe)
    batch = batch_of(windows, samples[:2])
    assert isinstance(recipe.tiling, Objects)
    seen = regions_of(batch.tiles, recipe.tiling.row)
    assert seen.features.shape == (18, 16)
    assert torch.allclose(seen.classes.sum(1), torch.ones(18), atol=1e-2)
    sure = seen.classes.amax(1).view(2, 9)
    assert (sure.diff(dim=1) <= 1e-3).all()  # the surest first
    sides = sorted(tuple(round(3 * x) for x in box) for box in seen.boxes[:9].tolist())
    assert sides == [(c, r, c + 1, r + 1) for c in range(3) for r in range(3)]
    numbers = geometry(seen.boxes)
    assert torch.allclose(numbers[:, 4:], torch.tensor([1 / 3, 1 / 3, 1 / 9]).expand(18, 3), atol=1e-5)
    assert waves(seen.boxes, 16).unique(dim=0).shape == (9, 16)
    with pytest.raises(ValueError, match="bytes"):
        regions_of(batch.tiles[:, 2:], recipe.tiling.row)


def test_a_model_and_a_tiling_of_other_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match="the model reads regions"):
        override(by_name("uniter_base"), ["tiling.row.features=1024"])
    with pytest.raises(RecipeError, match="cannot learn 'matching'"):
        override(by_name("vl_bert_base"), ['stages.pretrain.objective={"kind":"matching"}'])
    with pytest.raises(RecipeError, match="cannot learn 'classification'"):
        override(by_name("lxmert"), ["model.answers=0"])


TARGETS = (("kl",), ("features", "classes", "attributes"))


@pytest.mark.parametrize("targets", TARGETS)
def test_masked_regions_are_the_rows_own(site: Site, targets: Any) -> None:
    recipe = tiny(by_name("lxmert"))
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    objective = MaskedRegions(targets=targets, share=0.4, sure=True, smooth=True, first=1)
    together = objective(model, batch_of(windows, samples[:4]))
    assert 5 < float(together.weight) == float(together.documents[:, 1].sum()) < 30
    for place, sample in enumerate(samples[:4]):
        batch = batch_of(windows, [sample])
        output = objective(model, batch)
        close(together.documents[place], output.documents[0])
        assert float(objective.counted(model, batch)) == float(output.weight)


def test_a_region_is_told_by_the_class_the_detector_was_surest_of(site: Site) -> None:
    """A model whose answer is always the truth loses nothing by divergence, and is right each time."""
    recipe = tiny(by_name("uniter_base"))
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    batch = batch_of(windows, samples[:3])
    paired = model.pairs(batch)
    masked = MaskedRegions(targets=("kl",)).masked(batch, paired)
    seen = model.rows_of(batch, paired)
    truth = seen.classes[masked].clamp(min=1e-9).log()
    features = seen.features[masked]
    oracle = {"classes": truth, "features": features}
    model.predicted = lambda _, what: oracle[what]  # type: ignore[method-assign]  # an oracle
    output = MaskedRegions(targets=("features", "kl"))(model, batch)
    assert output.sum.item() == pytest.approx(0, abs=1e-2)
    output = MaskedRegions(targets=("classes",))(model, batch)
    assert output.documents[:, 2].sum() == output.weight > 0
    by_hand = -truth.log_softmax(1).max(1).values.sum()
    assert output.sum.item() == pytest.approx(by_hand.item(), rel=1e-3)


def test_words_are_masked_whole(site: Site) -> None:
    recipe = tiny(by_name("uniter_base"))
    model = model_of(recipe)
    assert not model.continues.any()  # built without the tokenizer's folder
    knowing = recipe.model.build(site.folder)
    assert isinstance(knowing, CrossEncoder)
    windows, samples = samples_of(site, recipe)
    batch = batch_of(windows, samples[:24])
    paired = knowing.pairs(batch)
    texts = paired.texts
    inside = knowing.continues[texts.ids] > 0
    inside[texts.positions <= 1] = False
    inside[texts.cu_seqlens[1:].long() - 1] = False
    assert inside.sum() > 5
    whole, single = (
        MaskedTokens(share=0.4, whole_words=w).masked(batch, paired, knowing.continues) for w in (True, False)
    )
    before = torch.roll(whole, 1)
    assert (whole[inside] == before[inside]).all()
    assert (single[inside] != torch.roll(single, 1)[inside]).any()
    assert 0.2 < whole.float().mean() < 0.5
    codec = windows.encoder.codec
    words = [codec.decode([i]) for i in texts.ids[inside].tolist()]
    assert all(word[:1].isalnum() for word in words)


def test_a_step_has_one_task_whoever_holds_its_rows(site: Site) -> None:
    recipe = tiny(by_name("uniter_base"))
    stage = recipe.stages[0]
    objective = stage.objective
    assert isinstance(objective, OneOf)
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    whole = objective.whole([objective.collect(model, batch_of(windows, samples[:12]))], None)
    parts = [objective.collect(model, batch_of(windows, samples[n:12:3])) for n in range(3)]
    split = objective.whole(parts, None)
    assert {number for number, _ in whole} == {number for number, _ in split}
    drawn = [objective.drawn(seed) for seed in range(1, 3001)]
    shares = [drawn.count(n) / 3000 for n in range(4)]
    assert shares == pytest.approx([2 / 6, 2 / 6, 1 / 6, 1 / 6], abs=0.03)


OBJECTIVES = {
    "uniter_base": OneOf(terms=(Term(objective=Matching(alignment=0.3)), Term(objective=MaskedTokens()))),
    "vl_bert_base": Sum(
        terms=(Term(objective=MaskedTokens()), Term(objective=MaskedRegions(targets=("classes",)), weight=0.5))
    ),
    "lxmert": Sum(terms=(Term(objective=Matching(alignment=0.3)), Term(objective=Classification()))),
}
TASKS = (
    Term(objective=MaskedTokens(share=0.3)),
    Term(objective=Matching(), weight=0.5),
    Term(objective=MaskedRegions(targets=("features", "classes"), smooth=True, sure=True)),
    Term(objective=Classification(), weight=2.0),
)
"""LXMERT's, each at once or one after the other."""


def steps(recipe: Recipe, site: Site, objective: Any, turns: int, seed: int = 0) -> list[tuple[float, float]]:
    windows, samples = samples_of(site, recipe)
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = replace(recipe.stages[0], objective=objective)
    engine = build_engine(model_of(recipe, seed), stage, len(stage.mixture), torch.device("cpu"))
    reports = []
    for step in range(2):
        groups = [samples[step * 9 : step * 9 + 9][n :: turns * world] for n in range(turns * world)]
        packs = [Pack.of_samples(group, windows.pixels(group)) for group in groups]
        report = engine.train_step(packs[rank::world], 1.0)
        assert report.taken
        reports.append((report.loss, report.grad_norm))
    return reports


def counted(model: CrossEncoder, shown: Any = None) -> list[Any]:
    """What the model is shown from here on, one forward after the other; it reads `shown` instead, if that is given."""
    passes: list[Any] = []
    fuse = model.fuse

    def counting(batch: Batch, paired: Any) -> Any:
        passes.append(paired)
        return fuse(batch, paired if shown is None else shown)

    model.fuse = counting  # type: ignore[method-assign]  # it is looked over its shoulder
    return passes


def asked(site: Site, recipe: Recipe) -> Batch:
    """Pairs, some with an answer and some without."""
    windows, samples = samples_of(site, recipe)
    found = [s for s in samples if s.label is not None][:5] + [s for s in samples if s.label is None][:7]
    assert len(found) == 12
    return batch_of(windows, found)


def test_all_tasks_take_one_forward_and_lose_what_each_would_alone(site: Site) -> None:
    """On the same masks: each term by itself reads what was shown to all of them."""
    recipe = tiny(by_name("lxmert"))
    model, again = model_of(recipe), model_of(recipe)
    batch = asked(site, recipe)
    objective = AtOnce(terms=TASKS)
    passes = counted(model)
    shares, texts = told = objective.whole([objective.collect(model, batch)], None)[0]
    assert passes == []  # a step is looked through without asking the model
    together = objective.again(model, batch, told)
    (shown,) = passes
    belongs = torch.tensor([right for _, right in texts])
    assert 0 < (belongs & (batch.classes >= 0)).sum() < (batch.classes >= 0).sum()

    torn = with_texts(again.pairs(batch), [words for words, _ in texts])
    again.pairs = lambda batch: torn  # type: ignore[method-assign]  # noqa: ARG005 -- the texts that were shown
    assert len(counted(again, shown)) == 0
    answered = replace(batch, classes=torch.where(belongs, batch.classes, -1))
    words, matching, regions, answers = (term.objective for term in TASKS)
    assert isinstance(matching, Matching)
    apart = [
        words(again, batch),  # type: ignore[arg-type]  # of this kind
        matching.again(again, batch, texts),
        regions(again, batch),  # type: ignore[arg-type]  # of this kind
        answers(again, answered),  # type: ignore[arg-type]  # of this kind
    ]
    assert (shown.texts.ids != torn.texts.ids).sum() > 3
    assert shown.hidden.sum() == apart[2].weight
    summed = torch.stack([share * output.sum for share, output in zip(shares, apart, strict=True)]).sum()
    assert together.sum.item() == pytest.approx(summed.item(), rel=1e-6)
    for share, term, output in zip(shares, TASKS, apart, strict=True):  # each a mean of its own
        assert share == pytest.approx(term.weight * float(apart[0].weight / output.weight), rel=1e-6)
    together.sum.backward()
    summed.backward()
    for (name, p), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_tasks_at_once_are_of_four_kinds() -> None:
    for terms in ((), TASKS[:1] * 2, (Term(objective=Contrastive()),)):
        with pytest.raises(ValueError, match="give each of matching, masked_tokens, masked_regions and classification"):
            AtOnce(terms=terms)
    with pytest.raises(RecipeError, match="cannot learn 'classification'"):
        override(by_name("lxmert"), ["model.answers=0"])


@pytest.mark.parametrize("name", [*OBJECTIVES, "at once"])
def test_the_curve_knows_no_turns(site: Site, name: str) -> None:
    recipe = tiny(by_name("lxmert" if name == "at once" else name))
    objective = AtOnce(terms=TASKS) if name == "at once" else OBJECTIVES[name]
    with alone():
        once = steps(recipe, site, objective, 1)
        thrice = steps(recipe, site, objective, 3)
    assert thrice == [pytest.approx(pair, rel=5e-4) for pair in once]


def half(recipe: Recipe, site: Site, objective: Any) -> tuple[float, float]:
    """One step in bfloat16 with everything computed again, where the second rank has nothing."""
    windows, samples = samples_of(site, recipe)
    stage = replace(recipe.stages[0], objective=objective, parallel=FSDP(dtype="bfloat16", recompute="full"))
    engine = build_engine(model_of(recipe), stage, len(stage.mixture), torch.device("cpu"))
    mine = samples[:6] if dist.get_rank() == 0 else []
    pack = Pack.of_samples(mine, windows.pixels(mine)) if mine else Pack.empty(recipe.tiling.shape)
    report = engine.train_step([pack], 1.0)
    assert report.taken
    return report.loss, report.grad_norm


def every_half(site: Site) -> list[tuple[float, float]]:
    return [half(tiny(by_name(name)), site, objective) for name, objective in OBJECTIVES.items()]


def test_a_rank_with_nothing_hangs_nobody(site: Site) -> None:
    ours, theirs = on_ranks(2, every_half, site)
    assert ours == theirs
    with alone():
        assert list(chain(*every_half(site))) == pytest.approx(list(chain(*ours)), rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_where_the_stage_says_and_nowhere_else(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    windows, samples = samples_of(site, recipe)
    full = Pack.of_samples(samples[:4], windows.pixels(samples[:4]))
    for parts in ({"layers"}, {"vision", "head"}, {"text"}):
        model = model_of(recipe)
        groups = apply_tuning(model, {part: Full(lr=1e-3) for part in parts})
        wanted = {n for group in groups for n in group.names}
        objective: Any = recipe.stages[0].objective
        for pack in (full, Pack.empty(recipe.tiling.shape)):
            model.zero_grad()
            objective(model, Batch.of(pack)).sum.backward()
            assert {n for n, p in model.named_parameters() if p.grad is not None} == wanted


def test_a_preview_shows_boxes(site: Site, tmp_path: Path) -> None:
    recipe = tiny(by_name("uniter_base"))
    windows, samples = samples_of(site, recipe)
    pack = Pack.of_samples(samples[:2], windows.pixels(samples[:2]))
    for tiles, _, *numbers in pack.cuts.tolist():
        assert cut_of(recipe.tiling, tiles, tuple(numbers)).tiles == 9
    page = write_preview(site.stream(recipe, recipe.stages[0]), 1, tmp_path / "preview.html")
    assert "9 regions" in page.read_text()


def test_words_move_onto_the_regions_that_are_there() -> None:
    torch.manual_seed(0)
    there, onto = torch.tensor([[True] * 5 + [False]]), torch.tensor([[True, True, False, True]])
    cost = torch.rand(1, 6, 4)
    moved = plan(cost, there, onto=onto)
    assert torch.allclose(moved.sum(2), there / 5, atol=1e-3)
    assert torch.allclose(moved.sum(1), onto / 3, atol=1e-3)
    left, right = torch.randn(1, 6, 8), torch.randn(1, 4, 8)
    fewer = transport_cost(left[:, :5], right[:, [0, 1, 3]], there[:, :5])
    assert transport_cost(left, right, there, onto=onto).item() == pytest.approx(fewer.item(), abs=1e-4)


@pytest.mark.parametrize("sides", [(4, 4), (3, 6), (4, 2)])
def test_a_plan_costs_little_more_than_the_least_there_is(sides: tuple[int, int]) -> None:
    """Proximal steps converge to the exact plan (arXiv:1802.04307, theorem 3.2). Of equal weights, each split so often that both
    sides have as many parts, the best plan is a permutation (Birkhoff): all are tried.
    """
    rows, cols = sides
    cost = torch.rand(1, rows, cols, generator=torch.Generator().manual_seed(rows))
    parts = math.lcm(rows, cols)
    spread = cost[0].repeat_interleave(parts // rows, 0).repeat_interleave(parts // cols, 1).numpy()
    exact = min(spread[range(parts), order].mean() for order in permutations(range(parts)))
    found = (plan(cost, torch.ones(1, rows, dtype=torch.bool), rounds=1000) * cost).sum().item()
    assert exact - 1e-3 <= found <= exact + 5e-3
    assert (plan(cost, torch.ones(1, rows, dtype=torch.bool)) * cost).sum().item() >= exact - 1e-3
