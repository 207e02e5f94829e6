"""Folders of `transformers` both ways: what its class computes from an export is what we compute, and the other way round."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm.classify import Classifier, ResNet
from mllm.dual import DualEncoder
from mllm.encoders import ClipVision, Encoder
from mllm.export import export, form_of, read_back
from mllm.masked import MaskedAutoencoder, MaskedPredictor
from mllm.objectives import MaskedCodes, MaskedPixels
from mllm.pairs import texts_of
from mllm.recipe import Recipe
from mllm.recipes import by_name
from mllm.streams import PairEncoder, SingleStream
from ops.images import decode, normalize
from pipelines.types import Batch
from tests.conftest import CORPUS, ROOT
from tests.mllm.test_pictures import pack_of

NAMES = ("clip_b32", "siglip_b16", "vilt_b32", "vit_b16", "resnet50", "mae_b16", "beit_b16")


def small(name: str) -> Recipe:
    recipe = by_name(name)
    model: Any = recipe.model.tiny()
    if name == "resnet50":
        model = replace(model, arch=replace(model.arch, norm="batch"))
    return replace(recipe, model=model, tiling=replace(recipe.tiling, size=model.side))


def exported(name: str, tmp_path: Path) -> tuple[Recipe, Any, Path]:
    recipe = small(name)
    torch.manual_seed(0)
    built = recipe.model.build().eval()
    for p in built.parameters():  # what begins at zero, too, has to be somewhere
        torch.nn.init.normal_(p, std=0.1) if p.dim() < 2 else None
    words = str(ROOT / "examples" / "tokenizer") if recipe.model.words.tokenizer else None
    return recipe, built, export(recipe, built, words, tmp_path / "export")


def theirs(name: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, name).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_back_and_begins_another(name: str, tmp_path: Path) -> None:
    recipe, built, folder = exported(name, tmp_path)
    assert form_of(recipe).kind == "transformers"
    assert (folder / "config.json").is_file()
    ours, again = built.state_dict(), read_back(folder).state_dict()
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    model: Any = replace(recipe.model, weights="there")
    begun = model.build(lambda where: str(folder) if where == "there" else where).state_dict()
    inside = "towers." if name in ("clip_b32", "siglip_b16") else "net."
    assert all(torch.equal(ours[key], begun[key]) for key in ours if key.startswith(inside))


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_shape_are_refused(name: str, tmp_path: Path) -> None:
    recipe, _, folder = exported(name, tmp_path)
    model: Any = replace(recipe.model, weights="there")
    wrong = {
        "clip_b32": {"vision": "hidden_size"},
        "siglip_b16": {"text": "layers"},
        "vilt_b32": {"shape": "layers"},
        "vit_b16": {"shape": "hidden_size"},
        "mae_b16": {"decoder": "layers"},
        "beit_b16": {"encoder": "layers"},
    }.get(name)
    if wrong is None:
        arch = replace(model.arch, depths=(1, 1, 1, 2))
    else:
        ((part, field),) = wrong.items()
        shape = getattr(model.arch, part)
        arch = replace(model.arch, **{part: replace(shape, **{field: 2 * getattr(shape, field)})})
    with pytest.raises(ValueError, match="mend the arch"):
        replace(model, arch=arch).build(lambda _: str(folder))


@torch.no_grad()
def test_clip_embeds_there_as_here(tmp_path: Path) -> None:
    """Whole, its vision alone, its text alone."""
    _, model, folder = exported("clip_b32", tmp_path)
    assert isinstance(model, DualEncoder)
    batch = Batch.of(pack_of(32, [1, 2, 3], [None] * 3))
    ids = torch.tensor([[9, 8, 7, 2], [5, 3, 6, 2]])
    text = texts_of(batch, 8)
    text.ids, text.positions = ids.flatten(), torch.arange(4).repeat(2)
    text.cu_seqlens, text.max_seqlen = torch.tensor([0, 4, 8], dtype=torch.int32), 4
    pictures, words = model._pictures(batch.tiles), model._texts(text)
    pixels = normalize(batch.tiles, model.mean, model.std)
    whole = theirs("CLIPModel", folder)
    whole.text_model.eos_token_id = 2  # which means: read a text at its greatest id
    ids[:, 3] = 2000
    table = whole.text_model.embeddings.token_embedding.weight
    table[2000] = table[2]
    output = whole(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(output.image_embeds, pictures, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.text_embeds, words, rtol=1e-4, atol=1e-4)
    vision = theirs("CLIPVisionModelWithProjection", folder)(pixel_values=pixels).image_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(vision, dim=-1), pictures, rtol=1e-4, atol=1e-4)
    reader = theirs("CLIPTextModelWithProjection", folder)
    reader.text_model.embeddings.token_embedding.weight.copy_(table)
    reader.text_model.eos_token_id = 2
    read = reader(input_ids=ids).text_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(read, dim=-1), words, rtol=1e-4, atol=1e-4)
    # A tower of a vision-language model begins from the same folder.
    arch = ClipVision(hidden_size=32, layers=2, heads=2, intermediate_size=64, patch=16, image=32)
    encoder = Encoder(arch=arch, weights=str(folder), layer=-1, cls="keep", normed=True).build(str)
    features = encoder.tower(pixels)[:, 0]
    mine = torch.nn.functional.normalize(model.towers.visual_projection(features), dim=-1)
    torch.testing.assert_close(mine, pictures, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_siglip_embeds_there_as_here(tmp_path: Path) -> None:
    _, model, folder = exported("siglip_b16", tmp_path)
    batch = Batch.of(pack_of(32, [1, 2], [None] * 2))
    pixels = normalize(batch.tiles, model.mean, model.std)
    text = texts_of(batch, 8)
    text.ids, text.positions = torch.tensor([4, 9, 6]), torch.arange(3)
    text.cu_seqlens, text.max_seqlen = torch.tensor([0, 3], dtype=torch.int32), 3
    filled = torch.full((1, 24), model.arch.pad)
    filled[0, :3] = text.ids
    output = theirs("SiglipModel", folder)(input_ids=filled, pixel_values=pixels)
    torch.testing.assert_close(output.image_embeds, model._pictures(batch.tiles), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.text_embeds, model._texts(text), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_vilt_fuses_there_as_here(tmp_path: Path) -> None:
    recipe, model, folder = exported("vilt_b32", tmp_path)
    assert isinstance(model, PairEncoder)
    assert isinstance(recipe.model, SingleStream)
    vilt = theirs("ViltForMaskedLM", folder)
    batch = Batch.of(pack_of(32, [1], [None]))
    paired = model.pairs(batch)
    text = paired.texts
    text.ids, text.positions = torch.tensor([7, 11, 5, 4]), torch.arange(4)
    text.cu_seqlens, text.max_seqlen, text.documents = torch.tensor([0, 4], dtype=torch.int32), 4, torch.tensor([0])
    fused = model.fuse(batch, replace(paired, tiles=torch.tensor([0])))
    pixels = normalize(batch.tiles, model.mean, model.std)
    logits = vilt(input_ids=text.ids[None], pixel_values=pixels).logits[0]
    torch.testing.assert_close(model.words_of(fused.texts), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"), [("vit_b16", "ViTForImageClassification"), ("resnet50", "ResNetForImageClassification")]
)
@torch.no_grad()
def test_classifiers_score_there_as_here(name: str, kind: str, tmp_path: Path) -> None:
    _, model, folder = exported(name, tmp_path)
    batch = Batch.of(pack_of(model.net.config.image_size if name == "vit_b16" else 64, [1, 2], [0, 1]))
    pixels = normalize(batch.tiles, model.mean, model.std)
    torch.testing.assert_close(
        theirs(kind, folder)(pixel_values=pixels).logits, model.scores(batch).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_masked_pictures_are_guessed_there_as_here(tmp_path: Path) -> None:
    _, mae, folder = exported("mae_b16", tmp_path / "mae")
    assert isinstance(mae, MaskedAutoencoder)
    batch = Batch.of(pack_of(32, [1, 2], [None] * 2))
    from mllm.chance import noise, seeds_of_tiles

    output = theirs("ViTMAEForPreTraining", folder)(
        normalize(batch.tiles, mae.mean, mae.std), noise=noise(seeds_of_tiles(batch), 16)
    )
    ours = MaskedPixels()(mae, batch)
    assert output.loss.item() == pytest.approx((ours.sum / ours.weight).item(), rel=1e-4)
    _, beit, folder = exported("beit_b16", tmp_path / "beit")
    assert isinstance(beit, MaskedPredictor)
    batch = Batch.of(pack_of(96, [1, 2], [None] * 2))
    hidden = beit.hidden(batch)
    pixels = normalize(batch.tiles, beit.mean, beit.std)
    output = theirs("BeitForMaskedImageModeling", folder)(pixels, bool_masked_pos=hidden.masked)
    torch.testing.assert_close(output.logits, hidden.predicted, rtol=1e-4, atol=1e-4)
    codes = MaskedCodes()(beit, batch)
    assert float(codes.weight) == float(hidden.masked.sum())
    again = read_back(folder)
    assert isinstance(again, MaskedPredictor)
    assert torch.equal(again.eval().hidden(batch).target, hidden.target)  # the tokenizer came with it


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_its_processor_sees_as_training_did(mode: Any, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    recipe = small("vit_b16")
    recipe = replace(recipe, tiling=replace(recipe.tiling, mode=mode))
    model = recipe.model.build()
    assert isinstance(recipe.model, Classifier)
    folder = export(recipe, model, None, tmp_path / "export")
    file = CORPUS / "instruct/images/000000017.jpg"
    made = AutoImageProcessor.from_pretrained(folder)(Image.open(file), return_tensors="pt")["pixel_values"]
    pixels = decode(file.read_bytes())
    tiling: Any = recipe.tiling
    tiles = tiling.tile(pixels, tiling.cut(pixels.shape[1], pixels.shape[2]))
    mean, std = (torch.tensor(numbers) for numbers in (recipe.model.mean, recipe.model.std))
    # In a crop the two round where the middle lies, and may be a pixel apart.
    assert float((normalize(tiles, mean, std) - made).abs().mean()) < {"crop": 0.12, "squash": 0.05}[mode]


def test_what_transformers_has_not_is_kept_under_our_names(tmp_path: Path) -> None:
    recipe = small("resnet50")
    model: Any = recipe.model
    assert isinstance(model.arch, ResNet)
    grouped = replace(recipe, model=replace(model, arch=replace(model.arch, norm="group")))
    assert form_of(grouped).kind == "whole"
    assert form_of(by_name("vlmo_base")).kind == "whole"
    built = grouped.model.build()
    folder = export(grouped, built, None, tmp_path / "export")
    assert not (folder / "config.json").exists()
    again = read_back(folder).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in built.state_dict().items())
