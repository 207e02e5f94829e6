"""A vision-language model that transformers has not as one: its towers and language model in folders of their own classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from mllm.connectors import bare
from mllm.encoders import Encoder, VisionEncoder
from mllm.folders import blip2
from mllm.folders.processors import IMAGE, tokenizer_of
from mllm.model import Model
from mllm.recipe import Recipe
from mllm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Parts:
    """encoder/ (encoder/0, encoder/1, ... of several), lm/, connector.safetensors, fusion.safetensors; `blip2` has more."""

    kind: Literal["parts"] = "parts"

    def write(self, recipe: Recipe, model: Model, tokenizer: str | None, out: Path) -> None:
        assert isinstance(model, VisionLanguageModel)
        assert tokenizer is not None
        _write(model, out)
        text = tokenizer_of(tokenizer, recipe.vlm.lm, (IMAGE,))
        text.save_pretrained(out / "lm")
        if blip2.fits(recipe.vlm):
            blip2.write(recipe.vlm, model, text, IMAGE, out / "whole")

    def read(self, recipe: Recipe, folder: Path) -> Model:
        spec = recipe.vlm
        of = len(spec.encoder.towers)
        places = [str(_tower(folder, number, of)) for number in range(of)]
        towers = tuple(replace(one, weights=name) for one, name in zip(spec.encoder.towers, places, strict=True))
        encoder = towers[0] if isinstance(spec.encoder, Encoder) else replace(spec.encoder, towers=towers)
        lm = replace(spec.lm, weights=str(folder / "lm"), tokenizer=spec.lm.text_codec)
        model = replace(spec, encoder=encoder, connector=bare(spec.connector), lm=lm, weights=None).build()
        found = load_file(folder / "connector.safetensors")
        joins = {name: found.pop(name) for name in list(found) if name.startswith("join.")}
        model.connector.load_state_dict(found, strict=True)
        model.join.load_state_dict({name.removeprefix("join."): value for name, value in joins.items()}, strict=True)
        stored = load_file(folder / "fusion.safetensors") if _of_fusion(model) else {}
        with torch.no_grad():
            for name, parameter in _of_fusion(model).items():
                parameter.copy_(stored[name])
        return model


def _write(model: VisionLanguageModel, out: Path) -> None:
    encoder = model.encoder
    towers: list[Any] = [encoder] if isinstance(encoder, VisionEncoder) else list(encoder.encoders)
    for number, tower in enumerate(towers):
        tower.tower.tower.save_pretrained(_tower(out, number, len(towers)))
    fused = _of_fusion(model)
    attached = {id(value) for value in fused.values()}
    names = dict(model.lm.model.named_parameters(remove_duplicate=False))
    alone = {name: value for name, value in model.lm.model.state_dict().items() if id(names.get(name)) not in attached}
    model.lm.model.save_pretrained(out / "lm", state_dict=alone)
    save_file({name: value.contiguous() for name, value in _between(model).items()}, out / "connector.safetensors")
    if fused:
        save_file({name: value.detach().contiguous() for name, value in fused.items()}, out / "fusion.safetensors")


def _of_fusion(model: VisionLanguageModel) -> dict[str, torch.nn.Parameter]:
    """The fusion's parameters by the model's names, wherever they lie."""
    own = {id(p) for p in model.parts().get("fusion", [])}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def _tower(folder: Path, number: int, of: int) -> Path:
    """Where a tower lies: in a folder of its own where there are several."""
    return folder / "encoder" if of == 1 else folder / "encoder" / str(number)


def _between(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """The connector, and what the join has of its own."""
    joins = {f"join.{name}": value for name, value in model.join.state_dict().items()}
    return {**model.connector.state_dict(), **joins}
