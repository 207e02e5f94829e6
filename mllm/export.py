"""A trained model as a folder that others read.

llava: encoder CLIP, connector MLP of depth 2, a Llama decoder, Splice  ->  one `LlavaForConditionalGeneration` folder
parts: any other vision-language model                                  ->  encoder/, lm/ (transformers), connector.safetensors
                                                                            and, where a fusion has weights, fusion.safetensors;
                                                                            BLIP-2 and InstructBLIP besides whole/, as one model
whole: a model of another kind                                          ->  model.safetensors under the model's own names;
                                                                            BLIP and BLIP-2's first stage besides as
                                                                            transformers' classes, captioner/ and retriever/
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from mllm import composed
from mllm.aligned import Aligned, Aligner
from mllm.aligned.folders import write
from mllm.connectors import MLP, bare
from mllm.encoders import ClipVision, Encoder, VisionEncoder
from mllm.fusion import Splice
from mllm.joins import Tiles
from mllm.lm import CausalLM, Llama
from mllm.model import Model
from mllm.recipe import Recipe, dump, load
from mllm.vlm import VLM, VisionLanguageModel
from pipelines.tiling import Pad

IMAGE = "<image>"


def format_of(recipe: Recipe) -> Literal["llava", "parts", "whole"]:
    """Which form a recipe's model has."""
    model = recipe.model
    if not isinstance(model, VLM):
        return "whole"
    encoder = model.encoder
    if not isinstance(encoder, Encoder) or encoder.cls == "keep" or encoder.normed or encoder.interpolate:
        return "parts"
    llava = (
        isinstance(encoder.arch, ClipVision)
        and model.connector == MLP(depth=2)
        and model.join == Tiles()
        and isinstance(model.lm.arch, Llama)
        and model.fusion == Splice()
    )
    return "llava" if llava else "parts"


def export(recipe: Recipe, model: Model, tokenizer: str | None, out: Path) -> Path:
    """Write `model` to the folder `out`, with the tokenizer of the folder `tokenizer`, if any; replaces what was there."""
    scratch = out.with_name(f".{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if not isinstance(model, VisionLanguageModel) or not isinstance(recipe.model, VLM):
        save_file({name: value.clone() for name, value in model.state_dict().items()}, scratch / "model.safetensors")
        for file in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
            if (Path(tokenizer or "") / file).is_file():
                shutil.copyfile(Path(tokenizer or "") / file, scratch / file)
        if isinstance(model, Aligner) and isinstance(recipe.model, Aligned) and tokenizer:
            write(model, recipe.model, tokenizer, scratch)
    elif format_of(recipe) == "llava":
        assert tokenizer is not None
        _llava(recipe, model, tokenizer, scratch)
    else:
        assert tokenizer is not None
        _parts(model, tokenizer, recipe.model.lm, scratch)
        if composed.fits(recipe.model):
            text = _tokenizer(tokenizer, recipe.model.lm)
            composed.write(recipe.model, model, text, IMAGE, scratch / "whole")
    (scratch / "recipe.json").write_text(dump(recipe))
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
    return out


def _llava(recipe: Recipe, model: VisionLanguageModel, tokenizer: str, out: Path) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    spec = recipe.model
    assert isinstance(spec, VLM)
    encoder = spec.encoder
    assert isinstance(encoder, Encoder)
    text = _tokenizer(tokenizer, spec.lm)
    image_id = text.convert_tokens_to_ids(IMAGE)
    layout = spec.layout(recipe.tiling)
    tower: Any = model.encoder.tower
    config = LlavaConfig(
        # Copies: the composed model sets how its parts attend, and would do so in the trained model too.
        vision_config=deepcopy(tower.tower.config),
        text_config=deepcopy(model.lm.model.config),
        image_token_index=image_id,
        projector_hidden_act="gelu",
        vision_feature_layer=encoder.layer,
        vision_feature_select_strategy="default",
        image_seq_length=layout.tokens_per_tile,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.load_state_dict(_llava_names(model), strict=True, assign=True)
    if len(text) > model.lm.model.config.vocab_size:
        llava.resize_token_embeddings(len(text), pad_to_multiple_of=64)
    llava.generation_config.eos_token_id = text.eos_token_id
    llava.generation_config.pad_token_id = text.pad_token_id
    llava.save_pretrained(out)
    pad = isinstance(recipe.tiling, Pad)
    side = recipe.tiling.size
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=pad,
            do_center_crop=not pad,
            size={"height": side, "width": side} if pad else {"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(encoder.mean),
            image_std=list(encoder.std),
        ),
        tokenizer=text,
        patch_size=encoder.arch.patch if isinstance(encoder.arch, ClipVision) else None,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=spec.lm.chat.jinja(),
    )
    processor.save_pretrained(out)


def _llava_names(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names."""
    tower: Any = model.encoder.tower
    state = {f"model.vision_tower.{name}": value for name, value in tower.tower.state_dict().items()}
    for ours, theirs in (("layers.0", "linear_1"), ("layers.1", "linear_2")):
        for kind in ("weight", "bias"):
            state[f"model.multi_modal_projector.{theirs}.{kind}"] = model.connector.state_dict()[f"{ours}.{kind}"]
    for name, value in model.lm.model.state_dict().items():
        kept = name.startswith("lm_head")
        state[name if kept else f"model.language_model.{name.removeprefix('model.')}"] = value
    return {name: value.contiguous() for name, value in state.items()}


def _parts(model: VisionLanguageModel, tokenizer: str, lm: CausalLM, out: Path) -> None:
    encoder = model.encoder
    towers: list[Any] = [encoder] if isinstance(encoder, VisionEncoder) else list(encoder.encoders)
    for number, tower in enumerate(towers):
        tower.tower.tower.save_pretrained(_tower(out, number, len(towers)))
    fused = _of_fusion(model)
    attached = {id(value) for value in fused.values()}
    names = dict(model.lm.model.named_parameters(remove_duplicate=False))
    alone = {name: value for name, value in model.lm.model.state_dict().items() if id(names.get(name)) not in attached}
    model.lm.model.save_pretrained(out / "lm", state_dict=alone)
    _tokenizer(tokenizer, lm).save_pretrained(out / "lm")
    save_file(
        {name: value.contiguous() for name, value in _between(model).items()},
        out / "connector.safetensors",
    )
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


def _tokenizer(folder: str, lm: CausalLM) -> Any:
    """The tokenizer with an `<image>` token and the chat template that the model was trained with."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if IMAGE not in text.get_vocab():
        text.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    text.chat_template = lm.chat.jinja()
    if lm.eos:
        text.eos_token = lm.eos
    if text.pad_token is None:
        text.pad_token = text.eos_token
    return text


def read_back(folder: Path) -> Model:
    """The model that `export` wrote to `folder`, float32, on CPU. Raises FileNotFoundError when it is no export of ours.

    Transformers itself reads its files: names on disk are not those of its modules.
    """
    if not (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"{folder} has no recipe.json; name a folder that `mllm export` wrote")
    recipe = load((folder / "recipe.json").read_bytes())
    if format_of(recipe) == "whole":
        model = recipe.model.bare().build()
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return model
    return _from_llava(folder, recipe) if format_of(recipe) == "llava" else _from_parts(folder, recipe)


def _from_llava(folder: Path, recipe: Recipe) -> VisionLanguageModel:
    from transformers import LlavaForConditionalGeneration

    model = _with_weights(recipe, None, None)
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    stored = llava.state_dict()
    own = model.state_dict()
    found = {name: stored[_llava_name(name)] for name in own}
    # Rows that the export added to the vocabulary are left away.
    model.load_state_dict({name: value[: len(own[name])] for name, value in found.items()}, strict=True)
    return model


def _from_parts(folder: Path, recipe: Recipe) -> VisionLanguageModel:
    model = _with_weights(recipe, folder, str(folder / "lm"))
    found = load_file(folder / "connector.safetensors")
    joins = {name: found.pop(name) for name in list(found) if name.startswith("join.")}
    model.connector.load_state_dict(found, strict=True)
    model.join.load_state_dict({name.removeprefix("join."): value for name, value in joins.items()}, strict=True)
    stored = load_file(folder / "fusion.safetensors") if _of_fusion(model) else {}
    with torch.no_grad():
        for name, parameter in _of_fusion(model).items():
            parameter.copy_(stored[name])
    return model


def _with_weights(recipe: Recipe, folder: Path | None, lm: str | None) -> VisionLanguageModel:
    """The recipe's model built from these weights in place of its own; towers lie in `folder`."""
    spec = recipe.model
    assert isinstance(spec, VLM)
    of = len(spec.encoder.towers)
    weights = [None if folder is None else str(_tower(folder, number, of)) for number in range(of)]
    towers = tuple(replace(one, weights=name) for one, name in zip(spec.encoder.towers, weights, strict=True))
    encoder = towers[0] if isinstance(spec.encoder, Encoder) else replace(spec.encoder, towers=towers)
    text = replace(spec.lm, weights=lm, tokenizer=spec.lm.text_codec)
    return replace(spec, encoder=encoder, connector=bare(spec.connector), lm=text).build()


def _llava_name(name: str) -> str:
    """What transformers calls the parameter that we call `name`: the other way round than `_llava_names`."""
    part, _, rest = name.partition(".")
    if part == "encoder":
        return f"model.vision_tower.{rest.removeprefix('tower.tower.')}"
    if part == "connector":
        layer, _, kind = rest.removeprefix("layers.").partition(".")
        return f"model.multi_modal_projector.linear_{1 if layer == '0' else 2}.{kind}"
    inner = rest.removeprefix("model.")
    return inner if inner.startswith("lm_head") else f"model.language_model.{inner.removeprefix('model.')}"
