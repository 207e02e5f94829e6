"""ALBEF, BLIP, CoCa and BLIP-2's first stage: what transformers computes, what a twin and a queue remember, who is hard."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common import on_ranks
from cluster.engines import Engine, alone, build_engine
from cluster.site import Site
from mllm.aligned import Aligned, Aligner, Rows, likeness
from mllm.annotators import Recaption, ScoreFilter
from mllm.connectors import QFormer
from mllm.export import export, read_back
from mllm.folders.blip import write
from mllm.objectives import HardMatching, Sum
from mllm.objectives.aligned import drawn
from mllm.recipe import DDP, FSDP, Recipe
from mllm.recipes import by_name
from mllm.tiny import tiny
from ops.images import normalize
from pipelines.types import Batch, Pack, Rejected, Sample
from pipelines.windows import PackWindows

ALL = ("albef", "blip_base", "coca_base", "blip2_stage1", "internvl_g")
CPU = torch.device("cpu")


def recipe_of(name: str) -> Recipe:
    return tiny(by_name(name))


def model_of(recipe: Recipe) -> Aligner:
    torch.manual_seed(0)
    model = recipe.model.build()
    assert isinstance(model, Aligner)
    with torch.no_grad():  # so that what is looked at shows in what is said
        for name, weight in model.state_dict().items():
            if weight.ndim == 2 and "net." in name:
                weight.mul_(4)
    return model


def samples_of(site: Site, recipe: Recipe) -> tuple[PackWindows, list[Sample]]:
    windows = PackWindows(site.stream(recipe, recipe.stages[0]))
    samples, _ = windows.samples(windows.rows(0))
    return windows, samples


def batch_of(site: Site, recipe: Recipe, count: int) -> Batch:
    windows, samples = samples_of(site, recipe)
    return Batch.of(Pack.of_samples(samples[:count], windows.pixels(samples[:count])))


def tokenizer_of(site: Site, recipe: Recipe) -> str:
    return site.stream(recipe, recipe.stages[0]).tokenizer


def spec_of(recipe: Recipe) -> Aligned:
    assert isinstance(recipe.model, Aligned)
    return recipe.model


def test_blip_is_transformers_two_classes_both_ways(site: Site, tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

    recipe = recipe_of("blip_base")
    model = model_of(recipe).eval()
    tokenizer = tokenizer_of(site, recipe)
    write(model, spec_of(recipe), tokenizer, tmp_path)
    batch = batch_of(site, recipe, 4)
    known = model.given(batch)
    ids, mask = known.rows.ids, known.rows.there.long()
    pixels = normalize(batch.tiles, model.encoder.mean, model.encoder.std)
    retriever: Any = BlipForImageTextRetrieval.from_pretrained(tmp_path / "retriever").eval()
    captioner: Any = BlipForConditionalGeneration.from_pretrained(tmp_path / "captioner").eval()
    own = model.embedded(batch)
    with torch.no_grad():
        cosines = retriever(input_ids=ids, pixel_values=pixels, attention_mask=mask, use_itm_head=False).itm_score
        torch.testing.assert_close(likeness(own.images, own.texts), cosines, rtol=1e-4, atol=1e-4)
        asked = known.rows.begun_with(5)
        scores = retriever(input_ids=asked.ids, pixel_values=pixels, attention_mask=mask).itm_score
        torch.testing.assert_close(model.matched(batch, torch.arange(4), known.rows), scores, rtol=1e-4, atol=1e-4)
        told = known.rows.begun_with(4)
        logits = captioner(input_ids=told.ids, pixel_values=pixels, attention_mask=mask).logits
        there = known.rows.there
        torch.testing.assert_close(model.caption(batch)[there], logits[there], rtol=1e-4, atol=1e-4)
    again = replace(spec_of(recipe), weights=str(tmp_path), tokenizer=tokenizer).build()
    theirs = dict(again.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())
    alone_ = replace(spec_of(recipe), weights=str(tmp_path / "captioner"), tokenizer=tokenizer).build()
    part = dict(alone_.named_parameters())
    name = "net.layers.0.decoder_attention.self.query.weight"
    assert torch.equal(part[name], theirs[name])
    assert torch.equal(part[name], part[name.replace("decoder_", "")])  # which that folder does not have
    narrow = replace(spec_of(recipe), arch=replace(spec_of(recipe).arch, width=8), weights=str(tmp_path))
    with pytest.raises(ValueError, match="and the recipe's arch says"):
        narrow.build()


def test_blips_export_captions_and_filters(site: Site, tmp_path: Path) -> None:
    """CapFilt: the captioner's texts, and of those what the matching head believes in."""
    recipe = recipe_of("blip_base")
    model = model_of(recipe)
    out = export(recipe, model, tokenizer_of(site, recipe), tmp_path / "export")
    again = read_back(out).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())  # the twin and the queue too
    documents = PackWindows(site.stream(recipe, recipe.stages[0])).rows(0)[:12]
    write_ = Recaption(weights=str(out / "captioner"), mode="replace", tokens=4).documents(str)
    captioned = write_(list(documents))
    assert any(before != after for before, after in zip(documents, captioned, strict=True))
    kept = [
        [
            not isinstance(row, Rejected)
            for row in ScoreFilter(weights=str(out / "retriever"), at_least=x).documents(str)(captioned)
        ]
        for x in (0.0, 0.4, 0.5, 0.6, 1.0)
    ]
    assert all(kept[0])
    assert not any(kept[-1])
    assert [sum(row) for row in kept] == sorted((sum(row) for row in kept), reverse=True)


def test_blip2s_first_stage_is_transformers_and_the_second_takes_it_over(site: Site, tmp_path: Path) -> None:
    from transformers import Blip2ForImageTextRetrieval

    recipe = recipe_of("blip2_stage1")
    model = model_of(recipe).eval()
    tokenizer = tokenizer_of(site, recipe)
    write(model, spec_of(recipe), tokenizer, tmp_path)
    batch = batch_of(site, recipe, 4)
    known = model.given(batch)
    ids, mask = known.rows.ids, known.rows.there.long()
    pixels = normalize(batch.tiles, model.encoder.mean, model.encoder.std)
    theirs: Any = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "retriever").eval()
    own = model.embedded(batch)
    with torch.no_grad():
        words = {"input_ids": ids, "attention_mask": mask}
        output = theirs(pixel_values=pixels, **words, use_image_text_matching_head=True)
        scores = model.matched(batch, torch.arange(4), known.rows)
        torch.testing.assert_close(scores, output.logits_per_image, rtol=1e-4, atol=1e-4)
        output = theirs(pixel_values=pixels, **words, use_image_text_matching_head=False)
        torch.testing.assert_close(own.images, output.image_embeds, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.texts, output.text_embeds, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(likeness(own.images, own.texts), output.logits_per_image, rtol=1e-4, atol=1e-4)
    again = replace(spec_of(recipe), weights=str(tmp_path), tokenizer=tokenizer).build()
    found = dict(again.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in model.named_parameters() if ".words." not in name)
    connector: Any = QFormer().tiny().build(spec_of(recipe).encoder.width, 64)
    connector.read(str(tmp_path / "retriever"))
    with torch.no_grad():
        features = model.features(batch)
        queries = connector.model(query_embeds=connector.queries.expand(4, -1, -1), encoder_hidden_states=features)
        torch.testing.assert_close(model.net.look(features), queries.last_hidden_state, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_internvls_stages_go_on_from_one_another(site: Site, tmp_path: Path) -> None:
    """LLaMA, then the contrast, then queries, then the connector before another language model: each takes what was there."""
    from transformers import LlamaForCausalLM

    first, second = recipe_of("internvl_c"), recipe_of("internvl_g")
    words = spec_of(second).arch.connector.config()  # type: ignore[union-attr]  # QLLaMA's
    words.vocab_size = 2048
    llama = LlamaForCausalLM(words).eval()
    llama.save_pretrained(tmp_path / "llama")
    contrast: Any = replace(spec_of(first), begins="llama").build(lambda name: str(tmp_path / name))
    batch = batch_of(site, first, 3)
    rows = contrast.given(batch).rows
    for text, there, read in zip(rows.ids, rows.there, contrast.net.read(rows), strict=True):
        states = llama.model(text[None, there]).last_hidden_state[0]
        torch.testing.assert_close(read[0], states[-1], rtol=1e-4, atol=1e-4)
    tokenizer = tokenizer_of(site, first)
    export(replace(first, model=spec_of(first)), contrast, tokenizer, tmp_path / "internvl-c")
    asking: Any = replace(spec_of(second), weights="internvl-c").build(lambda name: str(tmp_path / name))
    own = dict(asking.named_parameters())
    same = [n for n, p in contrast.named_parameters() if "picture_pool" not in n and torch.equal(p, own[n])]
    assert len(same) == len([n for n, _ in contrast.named_parameters() if "picture_pool" not in n])
    assert any(name.startswith("net.middle.layers.0.look.") and name not in same for name in own)
    torch.testing.assert_close(asking.net.read(rows), contrast.net.read(rows))
    out = export(second, asking, tokenizer, tmp_path / "internvl-g")
    connector: Any = spec_of(second).arch.connector.build(spec_of(second).encoder.width, 64)  # type: ignore[union-attr]
    connector.read(str(out))
    features = asking.features(batch)
    queries = connector.run(connector.asked(features), features, len(connector.queries))
    torch.testing.assert_close(asking.net.look(features), queries)
    with pytest.raises(ValueError, match="hold nothing of encoder"):
        replace(spec_of(second), weights="llama").build(lambda name: str(tmp_path / name))


@pytest.mark.parametrize("name", ["albef", "blip_base", "blip2_stage1"])
@torch.no_grad()
def test_texts_are_read_as_by_the_bert_that_they_begin_from(site: Site, name: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    recipe = recipe_of(name)
    spec, known = spec_of(recipe), batch_of(site, recipe, 3)
    plain: dict[str, Any] = {"attn_implementation": "eager"}
    config = BertConfig(
        vocab_size=2000,  # fewer than the recipe has, which adds words of its own
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2 if name != "blip2_stage1" else 4,
        intermediate_size=64,
        max_position_embeddings=32,
        type_vocab_size=1,
        **plain,
    )
    bert = BertForMaskedLM(config).eval()
    bert.bert.embeddings.token_type_embeddings.weight.zero_()  # of which ours have none
    bert.save_pretrained(tmp_path)
    model = replace(spec, begins="bert").build(lambda _: str(tmp_path)).eval()
    rows = model.given(known).rows
    rows = Rows(rows.ids.clamp(max=1999), rows.there)
    read = model.net.read(rows)
    layers = 1 if name == "albef" else 2  # the rest look at pictures
    for text, there, states in zip(rows.ids, rows.there, read, strict=True):
        theirs = bert(text[None, there], output_hidden_states=True).hidden_states[layers][0]
        torch.testing.assert_close(states[: len(theirs)], theirs, rtol=1e-4, atol=1e-4)
    config.num_hidden_layers = 1
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="name a folder of the language model that this kind begins from"):
        replace(spec, begins="bert").build(lambda _: str(tmp_path))


@pytest.mark.parametrize("name", ["blip_base", "coca_base", "blip2_stage1", "internvl_g"])
def test_a_caption_sees_its_picture_and_what_was_written(site: Site, name: str) -> None:
    recipe = recipe_of(name)
    model = model_of(recipe).eval()
    known = model.given(batch_of(site, recipe, 3))
    features = torch.randn(3, 5, 32)
    rows = known.rows
    later = rows.ids.clone()
    later[:, 4:] = (later[:, 4:] + 7) % 2048
    with torch.no_grad():
        said, changed = model.net.caption(features, rows), model.net.caption(features, Rows(later, rows.there))
        other = model.net.caption(torch.randn(3, 5, 32), rows)
    torch.testing.assert_close(said[:, :4], changed[:, :4], rtol=1e-4, atol=1e-5)
    assert (said[:, 4] - changed[:, 4]).abs().amax(1).min() > 1e-3
    assert (said - other).abs().amax(2)[rows.there].min() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_a_pair_in_a_pack_is_the_pair_alone(site: Site, name: str) -> None:
    recipe = recipe_of(name)
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    with torch.no_grad():
        packed = model.embedded(batch_of(site, recipe, 4))
        for place, sample in enumerate(samples[:4]):
            single = model.embedded(Batch.of(Pack.of_samples([sample], windows.pixels([sample]))))
            torch.testing.assert_close(packed.images[place], single.images[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(packed.texts[place], single.texts[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**31), st.integers(0, 3))
def test_a_hard_negative_is_never_the_positive(count: int, seed: int, alike: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, count, generator=generator) * 30
    texts = torch.randint(0, count - min(alike, count - 1), (count,), generator=generator)
    never = texts[:, None] == texts[None]
    seeds = torch.randint(0, 2**32, (count,), generator=generator)
    found = drawn(logits, never, seeds, 7)
    possible = ~never.all(1)
    rows = torch.arange(count)
    assert not never[rows[possible], found[possible]].any()
    order = torch.randperm(count, generator=generator)
    moved = drawn(logits[order], never[order], seeds[order], 7)
    assert torch.equal(moved, found[order])  # whoever draws for a row, and when, draws the same


def test_hard_negatives_are_others_that_look_alike(site: Site) -> None:
    recipe = recipe_of("albef")
    model = model_of(recipe)
    batch = batch_of(site, recipe, 8)
    (asked,) = HardMatching().whole([HardMatching().collect(model, batch)], None)
    texts = model.given(batch).rows.filled(model.context)
    assert len(asked.pairs) == 3 * 8
    own = [torch.equal(ids, texts[pair]) for ids, pair in zip(asked.ids, asked.pairs, strict=True)]
    assert own == asked.belongs.bool().tolist()
    assert sum(own) == 8


def spread(samples: list[Sample], windows: PackWindows, ways: int) -> list[Pack]:
    groups = [samples[n::ways] for n in range(ways)]
    return [Pack.of_samples(group, windows.pixels(group)) for group in groups]


def engine_of(recipe: Recipe) -> Engine:
    return build_engine(model_of(recipe), recipe.stages[0], 1, CPU)


Told = tuple[list[tuple[float, float]], dict[str, Any]]


def steps(recipe: Recipe, site: Site, turns: int) -> Told:
    """Losses and gradients of two steps, and what is remembered after them."""
    windows, samples = samples_of(site, recipe)
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = engine_of(recipe)
    reports = []
    for step in range(2):
        packs = spread(samples[step * 6 : step * 6 + 6], windows, turns * world)
        report = engine.train_step(packs[rank::world], 1.0)
        assert report.taken
        reports.append((report.loss, report.grad_norm))
    kept = {name: x for name, x in engine.model_state().items() if name.startswith(("slow.", "queue."))}
    return reports, {name: x.numpy().copy() for name, x in kept.items()}


def test_the_curve_and_the_memory_know_neither_turns_nor_ranks(site: Site) -> None:
    recipe = recipe_of("albef")
    with alone():
        once, kept = steps(recipe, site, 1)
        thrice, also = steps(recipe, site, 3)
    assert thrice == [pytest.approx(pair, rel=1e-3) for pair in once]
    for reports, theirs in [(thrice, also), *on_ranks(2, steps, recipe, site, 2)]:
        assert reports == [pytest.approx(pair, rel=1e-3) for pair in once]
        assert kept.keys() == theirs.keys()
        for key, value in kept.items():
            np.testing.assert_allclose(theirs[key], value, rtol=1e-3, atol=1e-4)
    assert kept["queue.seen"][0] == 12
    np.testing.assert_allclose(np.linalg.norm(kept["queue.images"][:12], axis=1), 1, rtol=1e-4)


def test_copies_take_packs_in_turn_whose_passes_reach_other_weights(site: Site) -> None:
    """Of BLIP-2's passes through one Q-Former some see pictures, some do not, and words alone write."""
    recipe = recipe_of("blip2_stage1")
    recipe = replace(recipe, stages=(replace(recipe.stages[0], parallel=DDP(dtype="float32")),))
    with alone():
        once, _ = steps(recipe, site, 1)
    for reports, _ in on_ranks(2, steps, recipe, site, 2):
        assert reports == [pytest.approx(pair, rel=1e-3) for pair in once]


def half(recipe: Recipe, site: Site) -> tuple[float, float]:
    """One step in bfloat16 with everything computed again, where the second rank has nothing."""
    windows, samples = samples_of(site, recipe)
    stage = replace(recipe.stages[0], parallel=FSDP(dtype="bfloat16", recompute="full"))
    engine = build_engine(model_of(recipe), stage, 1, CPU)
    pack = spread(samples[:6], windows, 1)[0] if dist.get_rank() == 0 else Pack.empty((3, 32, 32))
    report = engine.train_step([pack], 1.0)
    assert report.taken
    return report.loss, report.grad_norm


def test_a_rank_with_nothing_hangs_nobody(site: Site) -> None:
    recipe = recipe_of("blip2_stage1")
    ours, theirs = on_ranks(2, half, recipe, site)
    assert ours == theirs
    with alone():
        assert half(recipe, site) == pytest.approx(ours, rel=0.05)


def test_a_twin_follows_and_is_never_trained(site: Site) -> None:
    recipe = recipe_of("albef")
    windows, samples = samples_of(site, recipe)
    packs = spread(samples[:6], windows, 1)
    with alone():
        engine = engine_of(recipe)
        assert isinstance(recipe.model, Aligned)
        assert recipe.model.twin is not None
        model: Any = engine.module.model  # type: ignore[attr-defined]  # the one engine that there is without DeepSpeed
        key = "net.layers.1.attention.self.query.weight"
        start = {name: x.clone() for name, x in engine.model_state().items()}
        assert torch.equal(start[key], start[f"slow.{key}"])
        refused = engine.train_step(packs, 1.0, lambda *_: False)
        assert not refused.taken
        assert all(torch.equal(x, start[name]) for name, x in engine.model_state().items())
        engine.train_step(packs, 1.0)
        now = engine.model_state()
        expected = start[key].lerp(now[key], 1 - recipe.model.twin.momentum)
        torch.testing.assert_close(now[f"slow.{key}"], expected)
        assert not any(name.startswith(("slow.", "queue.")) for name, _ in model.named_parameters())
        engine.score(Batch.of(packs[0]))
        assert int(model.queue.seen) == 6  # what is scored is not remembered
        saved = {name: x.clone() for name, x in now.items()}
        engine.train_step(packs, 1.0)
        engine.load_model_state(saved)
        assert int(model.queue.seen) == 6
        assert torch.equal(model.slow["net"].layers[1].attention.self.query.weight, saved[f"slow.{key}"])


@pytest.mark.parametrize("name", ALL)
def test_a_sum_sees_a_batch_once_and_says_the_same(site: Site, name: str) -> None:
    recipe = recipe_of(name)
    model = model_of(recipe)
    batch = batch_of(site, recipe, 5)
    objective = recipe.stages[0].objective
    assert isinstance(objective, Sum)
    runs: list[int] = []
    model.encoder.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        together = objective(model, batch)
    assert len(runs) == 2  # once to collect, once to learn
    with torch.no_grad():
        terms: list[tuple[float, Any]] = [(term.weight, term.objective) for term in objective.terms]
        each = [(weight, one(model, batch)) for weight, one in terms]
    expected = sum(weight * float(one.sum / one.weight) for weight, one in each)
    assert float(together.sum / together.weight) == pytest.approx(expected, rel=1e-4)
