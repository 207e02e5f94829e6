"""Dual towers: what they embed is what transformers' embeds; the contrast is of the step, however its packs are spread."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import on_ranks
from cluster.engines import alone, build_engine
from cluster.site import Site
from mllm.dual import CLIP, DualEncoder, DualTower, Layers, SigLIP
from mllm.export import export, read_back
from mllm.objectives import Contrastive, NextToken
from mllm.pairs import texts_of
from mllm.recipe import FSDP, Cosine, Full, Recipe, Source, Stage, Steps
from mllm.recipes import by_name
from ops.images import normalize
from pipelines.corpora import Pairs, TextOnly
from pipelines.tiling import Resize
from pipelines.types import Batch, Pack, Sample
from pipelines.windows import PackWindows
from tests.conftest import ROOT

TINY = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
SMALL_CLIP = CLIP(vision=TINY, text=TINY, projection=24, patch=16, image=32, vocab_size=2048, context=20)
SMALL_SIGLIP = SigLIP(vision=TINY, text=TINY, patch=16, image=32, vocab_size=2048, context=16)
CPU = torch.device("cpu")


def recipe_of(arch: CLIP | SigLIP, loss: Any = "softmax") -> Recipe:
    stage = Stage(
        name="contrast",
        mixture=(Source(corpus=Pairs(name="example-pairs")), Source(corpus=TextOnly(name="example-text"))),
        tune={part: Full(lr=1e-3) for part in ("vision", "text", "head")},
        context=192,
        tokens_per_step=6 * 192,
        max_tiles=6,
        window=32,
        chunk=8,
        duration=Steps(count=2),
        objective=Contrastive(loss=loss),
        schedule=Cosine(warmup=0),
        parallel=FSDP(dtype="float32", recompute="none"),
    )
    model = DualTower(arch=arch, tokenizer="example-bpe", eos="<|im_end|>")
    return Recipe(name="dual", model=model, tiling=Resize(size=32), stages=(stage,))


BOTH = pytest.mark.parametrize(
    ("arch", "loss"), [(SMALL_CLIP, "softmax"), (SMALL_SIGLIP, "sigmoid")], ids=["clip", "siglip"]
)


def model_of(recipe: Recipe) -> DualEncoder:
    torch.manual_seed(0)
    model = recipe.model.build()
    assert isinstance(model, DualEncoder)
    return model


def samples_of(site: Site, recipe: Recipe) -> tuple[PackWindows, list[Sample]]:
    windows = PackWindows(site.stream(recipe, recipe.stages[0]))
    samples, _ = windows.samples(windows.rows(0))
    return windows, samples


@BOTH
def test_it_embeds_what_transformers_embeds(site: Site, arch: CLIP | SigLIP, loss: str) -> None:
    recipe = recipe_of(arch, loss)
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    chosen = [s for s in samples if s.tiles][:4]
    batch = Batch.of(Pack.of_samples(chosen, windows.pixels(chosen)))
    ours = model.pairs(batch)
    theirs = model.towers
    for config in (theirs.config.text_config, theirs.text_model.config):
        config._attn_implementation = "sdpa"
    texts = texts_of(batch, arch.context)
    pad = arch.pad if isinstance(arch, SigLIP) else 0
    ids = torch.full((4, arch.context), pad)
    ids[texts.owner, texts.positions] = texts.ids
    if isinstance(
        arch, CLIP
    ):  # they read a text at its first end mark, and ours has an id that means something else to them
        theirs.text_model.eos_token_id = 2047
        table = theirs.text_model.embeddings.token_embedding.weight.data
        table[2047] = table[texts.ids[texts.last[0]]]
        ids[torch.arange(4), texts.positions[texts.last]] = 2047
    pixels = normalize(batch.tiles, model.mean, model.std)
    with torch.no_grad():
        output = theirs(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(ours.images, output.image_embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.texts, output.text_embeds, rtol=1e-4, atol=1e-4)
    logits = ours.scale * ours.images @ ours.texts.T + ours.bias
    torch.testing.assert_close(logits, output.logits_per_image, rtol=1e-4, atol=1e-4)


@BOTH
def test_a_pair_in_a_pack_is_the_pair_alone(site: Site, arch: CLIP | SigLIP, loss: str) -> None:
    recipe = recipe_of(arch, loss)
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    pictured, plain = [s for s in samples if s.tiles], [s for s in samples if not s.tiles]
    mixed = [plain[0], pictured[0], plain[1], pictured[1], pictured[2]]
    packed = model.pairs(Batch.of(Pack.of_samples(mixed, windows.pixels(mixed))))
    assert packed.documents.tolist() == [1, 3, 4]
    for place, sample in enumerate(pictured[:3]):
        single = model.pairs(Batch.of(Pack.of_samples([sample], windows.pixels([sample]))))
        torch.testing.assert_close(packed.images[place], single.images[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed.texts[place], single.texts[0], rtol=1e-5, atol=1e-5)


def test_a_long_text_keeps_its_end_mark(site: Site) -> None:
    recipe = recipe_of(SMALL_CLIP)
    windows, samples = samples_of(site, recipe)
    long = max((s for s in samples if s.tiles), key=lambda s: len(s.input_ids))
    batch = Batch.of(Pack.of_samples([long], windows.pixels([long])))
    words = [token for token in long.input_ids.tolist() if token >= 0]
    assert len(words) > 12
    cut = texts_of(batch, 12)
    assert cut.ids.tolist() == [*words[:11], words[-1]]
    assert cut.positions.tolist() == list(range(12))


def test_a_text_tower_reads_both_pictures_and_texts_that_are_missing() -> None:
    model = model_of(recipe_of(SMALL_CLIP))
    pairs = model.pairs(Batch.of(Pack.empty((3, 32, 32))))
    assert pairs.images.shape == (0, 24)
    output = Contrastive()(model, Batch.of(Pack.empty((3, 32, 32))))
    output.sum.backward()
    assert float(output.weight) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def plain_loss(model: DualEncoder, packs: list[Pack], loss: str) -> Tensor:
    """The loss of all pairs at once, written out."""
    found = [model.pairs(Batch.of(pack)) for pack in packs]
    images, texts = torch.cat([f.images for f in found]), torch.cat([f.texts for f in found])
    logits = found[0].scale * images @ texts.T + found[0].bias
    right = torch.arange(len(images))
    if loss == "softmax":
        cross = torch.nn.functional.cross_entropy
        return (cross(logits, right) + cross(logits.T, right)) / 2
    signs = 2 * torch.eye(len(images)) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(images)


def spread(samples: list[Sample], windows: PackWindows, ways: int) -> list[Pack]:
    groups = [samples[n::ways] for n in range(ways)]
    return [Pack.of_samples(group, windows.pixels(group)) for group in groups]


@BOTH
@pytest.mark.parametrize("ways", [1, 2, 3])
def test_the_gradient_is_that_of_all_pairs_at_once(site: Site, arch: CLIP | SigLIP, loss: str, ways: int) -> None:
    recipe = recipe_of(arch, loss)
    windows, samples = samples_of(site, recipe)
    chosen = samples[:14]
    model = model_of(recipe)
    packs = spread(chosen, windows, ways)
    expected = plain_loss(model, [Pack.of_samples(chosen, windows.pixels(chosen))], loss)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    objective = recipe.stages[0].objective
    assert isinstance(objective, Contrastive)
    with torch.no_grad():
        collected = [objective.collect(model, Batch.of(pack)) for pack in packs]
    outputs = []
    for pack, told in zip(packs, objective.whole(collected, None), strict=True):
        outputs.append(objective.again(model, Batch.of(pack), told))
        outputs[-1].sum.backward()
    weight = sum(float(output.weight) for output in outputs)
    assert weight == sum(s.tiles > 0 for s in chosen)
    assert sum(o.sum.item() for o in outputs) / weight == pytest.approx(expected.item(), rel=1e-5)
    assert sum(float(o.documents[:, 0].sum()) for o in outputs) / weight == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if name in wanted:
            assert p.grad is not None
            torch.testing.assert_close(p.grad / weight, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def steps(recipe: Recipe, site: Site, turns: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of two steps over the same 12 groups of samples, in `turns` packs on each rank."""
    windows, samples = samples_of(site, recipe)
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = build_engine(model_of(recipe), recipe.stages[0], 2, CPU)
    reports = []
    for step in range(2):
        packs = spread(samples[step * 20 : step * 20 + 20], windows, turns * world)
        report = engine.train_step(packs[rank::world], 1.0)
        assert report.taken
        reports.append((report.loss, report.grad_norm))
    return reports


@BOTH
def test_the_curve_knows_neither_turns_nor_ranks(site: Site, arch: CLIP | SigLIP, loss: str) -> None:
    recipe = recipe_of(arch, loss)
    with alone():
        once = steps(recipe, site, 1)
        thrice = steps(recipe, site, 3)
    assert thrice == [pytest.approx(pair, rel=1e-4) for pair in once]
    for reports in on_ranks(2, steps, recipe, site, 2):
        assert reports == [pytest.approx(pair, rel=1e-4) for pair in once]


def test_a_model_learns_only_what_it_can() -> None:
    recipe = recipe_of(SMALL_CLIP)
    stage = replace(recipe.stages[0], objective=NextToken())
    with pytest.raises(ValueError, match="cannot learn 'next_token'; it learns contrastive"):
        replace(recipe, stages=(stage,))
    with pytest.raises(ValueError, match="cannot be shared between ranks"):
        replace(recipe, stages=(replace(recipe.stages[0], parallel=FSDP(context=2)),))
    heavier = replace(recipe.stages[0], mixture=(replace(recipe.stages[0].mixture[0], loss_weight=2.0),))
    with pytest.raises(ValueError, match="loss_weight would count for nothing; leave it at 1"):
        replace(recipe, stages=(heavier,))


@BOTH
def test_it_begins_from_transformers_weights(arch: CLIP | SigLIP, loss: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = arch.build()
    theirs.save_pretrained(tmp_path / "towers")
    spec = recipe_of(arch, loss).model
    assert isinstance(spec, DualTower)
    named = replace(spec, weights="towers")
    assert named.reads == ("towers",)
    model = named.build(lambda name: str(tmp_path / name))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(model.towers.state_dict()[name].reshape(value.shape), value)
    wrong = replace(named, arch=replace(arch, vision=replace(arch.vision, hidden_size=16)))
    with pytest.raises(ValueError, match="mend the arch"):
        wrong.build(lambda name: str(tmp_path / name))


@pytest.mark.parametrize("name", ["clip_b32", "vilt_b32", "mae_b16", "resnet50"])
def test_an_export_is_read_back(name: str, tmp_path: Path) -> None:
    recipe = by_name(name)
    model = recipe.model.tiny()
    recipe = replace(recipe, model=model, tiling=replace(recipe.tiling, size=model.side))
    torch.manual_seed(0)
    built = model.build()
    words = str(ROOT / "examples" / "tokenizer") if model.words.tokenizer else None
    folder = export(recipe, built, words, tmp_path / "export")
    assert (folder / "tokenizer.json").is_file() == (words is not None)
    again = read_back(folder).state_dict()
    for key, value in built.state_dict().items():
        assert again[key].equal(value), key
