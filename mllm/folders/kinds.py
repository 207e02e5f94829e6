"""Models of `transformers` within models of ours, as folders that both read: CLIP, SigLIP, ViLT, ViT, ResNet, MAE, BEiT.

    family_of(spec).write(...)            config.json, model.safetensors, what looks at pictures: as `from_pretrained` asks
    family_of(spec).read(...)             the model again, from what `write` wrote
    replace(spec, weights="name")         a model that begins from such a folder, whoever wrote it

What a model of ours has besides, such as a head for matching or a frozen tokenizer, lies in `rest.safetensors` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from mllm import weights
from mllm.classify import Classifier, ResNet, ViT
from mllm.dual import CLIP, DualEncoder, DualTower, SigLIP
from mllm.folders.processors import clip_pictures, copy_tokenizer
from mllm.masked import MAE, MaskedImage
from mllm.model import Model, ModelSpec
from mllm.recipe import Recipe
from mllm.streams import SingleStream
from pipelines.tiling import Resize
from pipelines.types import spec

REST = "rest.safetensors"


@spec
class Family:
    """Where a model of ours keeps its model of `transformers`: `inside` is the module's name, `name` and `auto` its classes'."""

    inside: str
    name: str
    auto: str = "AutoModel"
    kind: Literal["transformers"] = "transformers"

    def write(self, recipe: Recipe, model: Model, tokenizer: str | None, out: Path) -> None:
        inside: Any = getattr(model, self.inside)
        state = {name: value.contiguous() for name, value in inside.state_dict().items()}
        if isinstance(model, DualEncoder) and isinstance(model.arch, CLIP):
            state["logit_scale"] = state["logit_scale"].reshape(())  # ours has a dimension, to be sharded
        if tokenizer is not None and isinstance(recipe.model, DualTower):
            # by which CLIP finds a text's end
            inside.config.text_config.eos_token_id = _id(Path(tokenizer), recipe.model.words.eos)
        inside.save_pretrained(out, state_dict=state)
        named = model.state_dict().items()
        rest = {name: value.contiguous() for name, value in named if not name.startswith(f"{self.inside}.")}
        if rest:
            save_file(rest, out / REST)
        tiling = recipe.tiling_of(recipe.stages[-1])
        if isinstance(tiling, Resize):
            clip_pictures(recipe.model, tiling).save_pretrained(out)
        copy_tokenizer(tokenizer, out)

    def read(self, recipe: Recipe, folder: Path) -> Model:
        import transformers

        built = recipe.model.empty()
        kind = getattr(transformers, self.name)
        inside = weights.load(kind, self.auto, str(folder), dtype=torch.float32).state_dict()
        named = {f"{self.inside}.{name}": value for name, value in inside.items()}
        named |= load_file(folder / REST) if (folder / REST).is_file() else {}
        state = {name: named[name].reshape(value.shape) for name, value in built.state_dict().items()}
        built.load_state_dict(state, strict=True)
        return built


def family_of(model: ModelSpec) -> Family | None:
    """The family of a model; None where `transformers` has no class that computes what it does."""
    match model:
        case DualTower(arch=CLIP()):
            return Family(inside="towers", name="CLIPModel")
        case DualTower(arch=SigLIP()):
            return Family(inside="towers", name="SiglipModel")
        case SingleStream():
            return Family(inside="net", name="ViltForMaskedLM", auto="AutoModelForMaskedLM")
        case MaskedImage(arch=MAE()):
            return Family(inside="net", name="ViTMAEForPreTraining", auto="AutoModelForPreTraining")
        case MaskedImage():
            return Family(inside="net", name="BeitForMaskedImageModeling", auto="AutoModelForMaskedImageModeling")
        case Classifier(arch=ViT()):
            return Family(inside="net", name="ViTForImageClassification", auto="AutoModelForImageClassification")
        case Classifier(arch=ResNet(norm="batch")):  # transformers' has no other norm
            return Family(inside="net", name="ResNetForImageClassification", auto="AutoModelForImageClassification")
    return None


def _id(words: Path, token: str | None) -> int | None:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(words / "tokenizer.json")).token_to_id(token) if token else None
