"""A folder is released when it computes what was trained, and only then; adapters apart are the same model to peft."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm.adapters import ADAPTER, take_off
from mllm.connectors import MLP
from mllm.export import export, read_back
from mllm.model import Model
from mllm.recipe import LoRA, Recipe
from mllm.recipes import by_name
from mllm.released import RELEASED, NotReleased, Released, read_release, release, seen
from mllm.tiny import tiny
from mllm.tune import apply_tuning
from pipelines.windows import PackWindows
from tests.conftest import ROOT

TOKENIZER = str(ROOT / "examples" / "tokenizer")


def built(recipe: Recipe) -> Model:
    torch.manual_seed(0)
    model = recipe.model.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.1)
    return model


def released(recipe: Recipe, model: Model, folder: Path) -> Released:
    before = seen(recipe, model, (), None)
    return release(recipe, export(recipe, model, TOKENIZER, folder), before, "sft", "f00")


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("llava_15_7b", "LlavaForConditionalGeneration"),
        ("llava_next_7b", "LlavaNextForConditionalGeneration"),
        ("llava_next_video_7b", "LlavaNextVideoForConditionalGeneration"),
        ("internvl_15_26b", "InternVLForConditionalGeneration"),
        ("idefics_9b", "IdeficsForVisionText2Text"),
        ("openflamingo_9b", "mllm"),
        ("cambrian_1_8b", "mllm"),
        ("clip_b32", "mllm"),
        ("coca_base", "mllm"),
    ],
)
def test_what_computes_the_same_is_released(name: str, reader: str, tmp_path: Path) -> None:
    recipe = tiny(by_name(name))
    told = released(recipe, built(recipe), tmp_path / "export")
    assert told.read_by == reader
    assert told.greatest <= told.allowed
    assert (told.compared == "logits") == (told.tokens > 0) == (told.pictures > 0)
    assert told.files.keys() == {
        str(path.relative_to(tmp_path / "export")) for path in (tmp_path / "export").rglob("*") if path.is_file()
    } - {RELEASED}
    assert read_release(tmp_path / "export") == told


def test_a_held_out_row_is_looked_at_where_there_is_one(small: Recipe, packs: PackWindows, tmp_path: Path) -> None:
    model = built(small)
    before = seen(small, model, packs.samples(packs.rows(0))[0], packs.pixels)
    told = release(small, export(small, model, TOKENIZER, tmp_path / "export"), before, "pretrain", "f00")
    assert told.on.startswith("held-out row example-")
    assert told.agree == 1


@pytest.mark.parametrize("depth", [2, 1])
@pytest.mark.parametrize("how", ["noise", "nan"])
def test_what_computes_something_else_is_not(small: Recipe, depth: int, how: str, tmp_path: Path) -> None:
    """Read by transformers, and in parts: one matrix of many is wrong."""
    recipe = replace(small, model=replace(small.vlm, connector=MLP(depth=depth)))
    model = built(recipe)
    before = seen(recipe, model, (), None)
    folder = export(recipe, model, TOKENIZER, tmp_path / "export")
    release(recipe, folder, before, "sft", "f00")
    file = folder / ("model.safetensors" if depth == 2 else "lm/model.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    weights[name] = weights[name] * (torch.nan if how == "nan" else 1.05)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(NotReleased, match="is not the file that was checked"):
        read_release(folder)
    with pytest.raises(NotReleased, match=f"It stays there without {RELEASED}"):
        release(recipe, folder, before, "sft", "f00")
    assert read_release(folder) is None


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("depth", [2, 1])
@torch.no_grad()
def test_an_adapter_apart_is_the_trained_model_to_peft_and_to_us(
    small: Recipe, depth: int, dora: bool, tmp_path: Path
) -> None:
    """On the whole model of transformers, and on the language model's folder; ranks may differ between parts."""
    tune = {
        "lm.layers": LoRA(lr=1e-3, rank=4, alpha=8, dora=dora),
        "lm.*.layers.1.mlp.*": LoRA(lr=1e-3, rank=2, alpha=4, dora=dora),
    }
    recipe = replace(small, model=replace(small.vlm, connector=MLP(depth=depth)))
    model = built(recipe)
    apply_tuning(model, tune)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.5)
    before = seen(recipe, model, (), None)
    adapters = take_off(recipe, model)
    assert {*adapters.ranks.values()} == {2, 4}
    bare = seen(recipe, model, (), None)
    assert before.logits is not None
    assert bare.logits is not None
    assert (before.logits - bare.logits).abs().max() > 0.1
    folder = export(recipe, model, TOKENIZER, tmp_path / "export")
    with pytest.raises(NotReleased):
        release(recipe, folder, before, "sft", "f00")
    adapters.write(folder / ADAPTER)
    assert release(recipe, folder, before, "sft", "f00").agree == 1
    again = seen(recipe, read_back(folder), (), None)  # as one talks to it
    assert again.logits is not None
    assert (before.logits - again.logits).abs().max() < 1e-4


def test_without_an_adapter_there_is_none_to_be_kept_apart(small: Recipe) -> None:
    with pytest.raises(ValueError, match="its last stage trains no LoRA"):
        take_off(small, built(small))
