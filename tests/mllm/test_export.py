"""The exported folder is the same model to transformers: same logits, same pixels, same tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.connectors import MLP
from mllm.export import export, form_of, read_back
from mllm.fusion import CrossAttention, Fusion, PreLMAdapter, RoutedExperts
from mllm.recipe import Recipe
from mllm.recipes import by_name
from mllm.tiny import tiny
from mllm.vlm import VisionLanguageModel
from ops.images import normalize
from pipelines.types import IMAGE_TOKEN, Batch, Pack
from pipelines.windows import PackWindows
from tests.conftest import CORPUS, ROOT

TOKENIZER = str(ROOT / "examples" / "tokenizer")


@pytest.fixture(scope="module")
def exported(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionLanguageModel, Path]:
    torch.manual_seed(0)
    model = recipe.vlm.build().eval()
    return model, export(recipe, model, TOKENIZER, tmp_path_factory.mktemp("run") / "export")


@torch.no_grad()
def test_llava_gives_the_same_logits(exported: tuple[VisionLanguageModel, Path], packs: PackWindows) -> None:
    from transformers import LlavaForConditionalGeneration

    model, folder = exported
    llava = LlavaForConditionalGeneration.from_pretrained(folder)
    samples, _ = packs.samples(packs.rows(0))
    sample = next(s for s in samples if s.tiles == 2)
    batch = Batch.of(Pack.of_samples([sample], packs.pixels([sample])))
    ours = model(batch) @ model.lm.head.T
    ids = torch.where(batch.input_ids == IMAGE_TOKEN, llava.config.image_token_id, batch.input_ids)
    pixels = normalize(batch.tiles, model.tower.mean, model.tower.std)
    theirs = llava(input_ids=ids[None], pixel_values=pixels).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_its_processor_sees_and_writes_as_training_did(
    exported: tuple[VisionLanguageModel, Path], recipe: Recipe
) -> None:
    from transformers import AutoProcessor

    from ops.images import decode
    from pipelines.tiling import Pad

    model, folder = exported
    processor = AutoProcessor.from_pretrained(folder)
    file = CORPUS / "instruct/images/000000017.jpg"
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=Image.open(file), text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 36
    assert isinstance(recipe.tiling, Pad)
    pixels = decode(file.read_bytes())
    tiles = recipe.tiling.tile(pixels, recipe.tiling.cut(pixels.shape[1], pixels.shape[2]))
    ours = normalize(tiles, model.tower.mean, model.tower.std)
    # Pillow pads and then resizes where we resize and then pad: a row of pixels at the picture's edge may differ.
    assert np.abs(ours.numpy() - np.asarray(inputs["pixel_values"])).mean() < 0.05


def test_a_model_that_is_no_llava_is_exported_in_parts(tmp_path: Path) -> None:
    from dataclasses import replace

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    real, small = by_name("vila_real"), by_name("vila_smoke")
    spec = replace(real, model=replace(small.vlm, encoder=replace(real.vlm.encoder, weights=None)), tiling=real.tiling)
    model = spec.vlm.build().eval()
    folder = export(spec, model, TOKENIZER, tmp_path / "export")
    lm = AutoModelForCausalLM.from_pretrained(folder / "lm")
    assert torch.equal(lm.lm_head.weight, model.lm.head)
    assert load_file(folder / "connector.safetensors").keys() == model.connector.state_dict().keys()
    assert (folder / "encoder" / "model.safetensors").is_file()


@pytest.mark.parametrize("depth", [1, 2])
def test_what_was_written_is_read_back(recipe: Recipe, tmp_path: Path, depth: int) -> None:
    """As one LLaVA folder, and part by part."""
    changed = replace(recipe, model=replace(recipe.vlm, connector=MLP(depth=depth)))
    assert form_of(changed).kind == {1: "parts", 2: "llava"}[depth]
    torch.manual_seed(0)
    model = changed.vlm.build()
    again = read_back(export(changed, model, TOKENIZER, tmp_path / "export"))
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("fusion", [CrossAttention(every=2), PreLMAdapter(hidden=8), RoutedExperts()], ids=str)
def test_a_fusions_weights_are_written_and_read_back(recipe: Recipe, tmp_path: Path, fusion: Fusion) -> None:
    """Beside the language model's, which stays a folder of its own kind, wherever they lie in the model."""
    from transformers import AutoModelForCausalLM

    changed = replace(recipe, model=replace(recipe.model, fusion=fusion))
    assert form_of(changed).kind == "parts"
    torch.manual_seed(0)
    model = changed.model.build()
    for parameter in model.parts()["fusion"]:
        torch.nn.init.normal_(parameter)
    folder = export(changed, model, TOKENIZER, tmp_path / "export")
    ours, theirs = model.state_dict(), read_back(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lm = AutoModelForCausalLM.from_pretrained(folder / "lm")
    assert sum(p.numel() for p in lm.parameters()) == sum(p.numel() for p in model.parts()["lm"])


@pytest.mark.parametrize("name", ["mini_gemini_7b", "minicpm_v_20", "bliva_7b", "vila_15_3b_s2"])
def test_parts_of_any_system_are_read_back(name: str, tmp_path: Path) -> None:
    """Several towers, separators, branches."""
    small = tiny(by_name(name))
    assert form_of(small).kind == "parts"
    torch.manual_seed(0)
    model = small.model.build()
    again = read_back(export(small, model, TOKENIZER, tmp_path / "export"))
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
