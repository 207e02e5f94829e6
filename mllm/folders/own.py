"""A model of any kind as one file of weights under its own names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save_file

from mllm.aligned import Aligned, Aligner
from mllm.folders import blip
from mllm.folders.processors import copy_tokenizer
from mllm.model import Model
from mllm.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Own:
    """model.safetensors, and what `blip` has beside it."""

    kind: Literal["whole"] = "whole"

    def write(self, recipe: Recipe, model: Model, tokenizer: str | None, out: Path) -> None:
        save_file({name: value.clone() for name, value in model.state_dict().items()}, out / "model.safetensors")
        copy_tokenizer(tokenizer, out)
        if isinstance(model, Aligner) and isinstance(recipe.model, Aligned) and tokenizer:
            blip.write(model, recipe.model, tokenizer, out)

    def read(self, recipe: Recipe, folder: Path) -> Model:
        model = recipe.model.empty()
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return model
