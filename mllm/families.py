"""Models of `transformers` within models of ours, as folders that both read: CLIP, SigLIP, ViLT, ViT, ResNet, MAE, BEiT.

    write(spec, model, tiling, out)       config.json, model.safetensors, what looks at pictures: as `from_pretrained` asks
    read(spec, folder)                    the model again, from what `write` wrote
    replace(spec, weights="name")         a model that begins from such a folder, whoever wrote it

What a model of ours has besides, such as a head for matching or a frozen tokenizer, lies in `rest.safetensors` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mllm import weights
from mllm.classify import Classifier, ResNet, ViT
from mllm.dual import CLIP, DualEncoder, DualTower, SigLIP
from mllm.masked import MAE, MaskedImage
from mllm.model import Model, ModelSpec
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


def write(model: ModelSpec, built: Model, tiling: Any, words: Path | None, out: Path) -> None:
    """Write `built`, of a `model` that has a family, to the folder `out`; `words` is the tokenizer's, if it reads text."""
    family = family_of(model)
    assert family is not None
    inside: Any = getattr(built, family.inside)
    own = f"{family.inside}."
    state = {name: value.contiguous() for name, value in inside.state_dict().items()}
    if isinstance(built, DualEncoder) and isinstance(built.arch, CLIP):
        state["logit_scale"] = state["logit_scale"].reshape(())  # ours has a dimension, to be sharded
    if words is not None and isinstance(model, DualTower):
        inside.config.text_config.eos_token_id = _id(words, model.words.eos)  # by which CLIP finds a text's end
    inside.save_pretrained(out, state_dict=state)
    rest = {name: value.contiguous() for name, value in built.state_dict().items() if not name.startswith(own)}
    if rest:
        save_file(rest, out / REST)
    if isinstance(tiling, Resize):
        _processor(model, tiling).save_pretrained(out)


def read(model: ModelSpec, folder: Path) -> Model:
    """The model that `write` wrote to `folder`, float32, on CPU."""
    family = family_of(model)
    assert family is not None
    import transformers

    built = model.bare().build()
    kind = getattr(transformers, family.name)
    inside = weights.load(kind, family.auto, str(folder), dtype=torch.float32).state_dict()
    named = {f"{family.inside}.{name}": value for name, value in inside.items()}
    named |= load_file(folder / REST) if (folder / REST).is_file() else {}
    state = {name: named[name].reshape(value.shape) for name, value in built.state_dict().items()}
    built.load_state_dict(state, strict=True)
    return built


def _id(words: Path, token: str | None) -> int | None:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(words / "tokenizer.json")).token_to_id(token) if token else None


def _processor(model: Any, tiling: Resize) -> Any:
    """What makes pixels of a picture as training did."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": tiling.size, "width": tiling.size}
    crop = tiling.mode == "crop"
    return CLIPImageProcessorPil(
        size={"shortest_edge": tiling.size} if crop else square,
        do_center_crop=crop,
        crop_size=square,
        image_mean=list(model.mean),
        image_std=list(model.std),
    )
