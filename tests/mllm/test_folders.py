"""Folders of transformers' whole models, both ways: what ours writes theirs reads, what theirs writes ours reads, same logits."""

import io
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from cluster.site import load_site
from mllm.archs import Mistral
from mllm.connectors import Pool
from mllm.export import export, form_of, read_back
from mllm.folders import idefics, wholes
from mllm.recipe import Recipe, RecipeError, dump, load, override
from mllm.recipes import by_name
from mllm.tiny import tiny
from mllm.vlm import VisionLanguageModel
from ops.images import normalize
from pipelines.encode import Encoder, TextCodec
from pipelines.pictures import measure, pixels
from pipelines.types import IMAGE_TOKEN, Batch, Budget, Document, Image, Pack, RowId, Text
from pipelines.windows import PackWindows
from tests.conftest import ROOT

SITE = load_site(str(ROOT / "examples" / "site.toml"))
TOKENIZER = str(ROOT / "examples" / "tokenizer")

FORMS = {
    "llava_15_7b": "llava",
    "llava_next_interleave_0_5b": "llava",  # SigLIP, and a Qwen whose embeddings are tied
    "llava_next_7b": "llava_next",
    "llava_next_mistral_7b": "llava_next",
    "llava_next_video_7b": "llava_next_video",
    "internvl_15_26b": "internvl",
    "vila_15_40b": "internvl",  # without tags, and a layer before the last
    "idefics_9b": "idefics",
}


@cache
def small(name: str) -> Recipe:
    return tiny(by_name(name))


@dataclass
class Asked:
    """A row with pictures, as a batch of ours and as what transformers' class is called with."""

    batch: Batch
    words: dict[str, Any]
    text: Tensor
    """Positions that hold words of the common vocabulary."""


def asked(recipe: Recipe, model: VisionLanguageModel, tokenizer: Any) -> Asked:
    stream = replace(SITE.stream(recipe, recipe.stages[0]), annotators=())
    windows = PackWindows(stream)
    samples, _ = windows.samples(windows.rows(0))
    sample = max((s for s in samples if s.pictures), key=lambda s: s.tiles)
    batch = Batch.of(Pack.of_samples([sample], windows.pixels([sample])))
    form = wholes.form_of(recipe.vlm)
    assert form is not None
    place = tokenizer.convert_tokens_to_ids(form.words[0])
    if form.kind == "idefics":
        around = tokenizer.convert_tokens_to_ids(idefics.AROUND)
        pixels = normalize(batch.tiles, model.encoder.mean, model.encoder.std)  # type: ignore[arg-type]  # one tower
        return Asked(batch, idefics.looked_at(idefics.as_words(batch, place, around), place, pixels), ~batch.visual)
    ids = torch.where(batch.input_ids == IMAGE_TOKEN, place, batch.input_ids)
    if len(form.words) == 3:  # tags around each picture
        at = (batch.input_ids == IMAGE_TOKEN).nonzero().squeeze(1)
        for run in at.split(batch.cuts[:, 1].tolist()):
            ids[run[0]], ids[run[-1]] = tokenizer.convert_tokens_to_ids(list(wholes.TAGS))
    pixels = normalize(batch.tiles, model.encoder.mean, model.encoder.std)  # type: ignore[arg-type]  # one tower
    words: dict[str, Any] = {"input_ids": ids[None]}
    match form.kind:
        case "llava_next":
            assert len(batch.cuts) == 1
            words |= {"pixel_values": pixels[None], "image_sizes": batch.cuts[:, 5:7]}
        case "llava_next_video":
            words |= {"pixel_values_videos": pixels[None]}
        case _:
            words |= {"pixel_values": pixels}
    return Asked(batch, words, ~batch.visual)


@torch.no_grad()
def compare(recipe: Recipe, model: VisionLanguageModel, family: Any, tokenizer: Any) -> None:
    row = asked(recipe, model, tokenizer)
    ours = model(row.batch) @ model.lm.head.T
    theirs = family(**row.words).logits[0, :, : ours.shape[1]]
    torch.testing.assert_close(ours[row.text], theirs[row.text], rtol=1e-4, atol=1e-4)
    assert ours[row.text].std() > 1e-3


def lively(model: torch.nn.Module) -> None:
    """Weights large enough for logits to tell one mistake from another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("name", FORMS)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name: str, tmp_path: Path) -> None:
    recipe = small(name)
    assert form_of(recipe).kind == FORMS[name]
    form = wholes.form_of(recipe.vlm)
    assert form is not None
    torch.manual_seed(0)
    model = recipe.vlm.build().eval()
    lively(model)
    folder = export(recipe, model, TOKENIZER, tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    family = getattr(transformers, form.family).from_pretrained(folder).eval()
    compare(recipe, model, family, tokenizer)
    state, again = model.state_dict(), read_back(folder).state_dict()
    if (
        form.kind == "idefics"
    ):  # a mark is the embedding of a word, which the tokenizer may have among those that it had
        words = state["lm.model.model.embed_tokens.weight"]
        for name, word in zip(idefics.MARKS, form.words, strict=True):
            place = tokenizer.convert_tokens_to_ids(word)
            if place < len(words):
                words[place] = state[name]
    assert all(torch.equal(value, again[key]) for key, value in state.items())

    lively(family)  # other weights, under its own names
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.mul_(0.9)
    family.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    named = replace(recipe, model=replace(recipe.vlm, weights="whole"))
    assert load(dump(named)) == named
    assert named.vlm.reads == ("whole",)
    read = named.vlm.build(lambda _: str(tmp_path / "theirs")).eval()
    compare(recipe, read, family, tokenizer)


def test_the_processor_of_a_llava_next_cuts_pictures_as_we_do(tmp_path: Path) -> None:
    from PIL import Image

    recipe = small("llava_next_7b")
    model = recipe.vlm.build()
    processor = transformers.AutoProcessor.from_pretrained(export(recipe, model, TOKENIZER, tmp_path / "export"))
    layout = recipe.vlm.layout(recipe.tiling)
    for size in ((64, 40), (40, 64), (50, 50)):
        inputs = processor(images=Image.new("RGB", size), text="<image>", return_tensors="pt")
        cut = recipe.tiling.cut(width=size[0], height=size[1])
        assert inputs["pixel_values"].shape[1] == cut.tiles
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == layout.tokens(cut)


@torch.no_grad()
def test_the_processor_of_an_idefics_writes_pages_as_we_do(tmp_path: Path) -> None:
    """Two pictures side by side, and one among words: the same tokens, and from them and the same pixels the same logits."""
    from PIL import Image as Pillow

    recipe = small("idefics_9b")
    torch.manual_seed(0)
    model = recipe.vlm.build().eval()
    lively(model)
    folder = export(recipe, model, TOKENIZER, tmp_path / "export")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "IdeficsProcessor"
    family = transformers.IdeficsForVisionText2Text.from_pretrained(folder).eval()

    side = recipe.tiling.size
    chance = np.random.default_rng(0)
    shown = [Pillow.fromarray(chance.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(3)]
    first, second, third = shown
    page = ["A red shirt,", first, second, "and a hat.", third, "On a chair:"]
    inputs = processor(text=page, add_eos_token=True, return_tensors="pt")

    lm = recipe.vlm.lm
    codec = TextCodec(TOKENIZER, lm.bos, lm.eos)
    encoder = Encoder(codec, lm.chat, recipe.vlm.layout(recipe.tiling), Budget(tokens=256, tiles=8))
    segments = tuple(Text(text=part) if isinstance(part, str) else Image(data=_png(part)) for part in page)
    document = Document(id=RowId(corpus="c", shard="s", epoch=0, row=0), source=0, segments=segments)
    samples = encoder.encode(measure(document, recipe.tiling))
    batch = Batch.of(Pack.of_samples(samples, pixels(samples[0].pictures, recipe.tiling)))
    ids = processor.tokenizer.convert_tokens_to_ids(["<image>", idefics.AROUND])
    assert inputs["input_ids"][0].tolist() == idefics.as_words(batch, *ids).tolist()

    theirs = family(**inputs).logits[0]
    ours = model(batch) @ model.lm.head.T
    text = ~batch.visual
    torch.testing.assert_close(ours[text], theirs[text, : ours.shape[1]], rtol=1e-3, atol=1e-3)


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def test_weights_of_the_whole_must_fit_a_class_and_the_numbers(tmp_path: Path) -> None:
    recipe = small("llava_15_7b")
    folder = export(recipe, recipe.vlm.build(), TOKENIZER, tmp_path / "export")
    lm = recipe.vlm.lm
    narrow = replace(lm, arch=replace(lm.arch, intermediate_size=64))  # type: ignore[call-arg]  # a Llama
    with pytest.raises(ValueError, match="mend the recipe's numbers"):
        replace(recipe.vlm, weights=str(folder), lm=narrow).build()
    for change in ("model.connector.depth=1", 'model.fusion={"kind": "cross_attention"}', "model.encoder.cls=keep"):
        with pytest.raises(RecipeError, match="none of the classes known here is this one"):
            override(recipe, ["model.weights=whole", change])
    assert wholes.form_of(replace(recipe.vlm, connector=Pool())) is None  # pooled after, as none of its classes has it
    mistral = Mistral(vocab_size=2048, hidden_size=64, layers=2, heads=4, kv_heads=2, intermediate_size=96)
    assert wholes.form_of(replace(recipe.vlm, lm=replace(recipe.vlm.lm, arch=mistral))) is not None
    other = replace(small("internvl_15_26b").vlm, weights=str(folder))
    with pytest.raises(ValueError, match="hold a 'llava' and the recipe's model is a 'internvl'"):
        other.build()
