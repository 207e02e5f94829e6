"""A trained model as a folder that others read.

llava, llava_next, llava_next_video, internvl,  models that transformers has: one folder of its class, see `mllm.folders`
    idefics
parts: any other vision-language model          encoder/, lm/ (transformers), connector.safetensors
                                                and, where a fusion has weights, fusion.safetensors;
                                                BLIP-2 and InstructBLIP besides whole/, as one model
transformers: a model of another kind that      a folder of its class, see `mllm.families`
    transformers has
whole: any other                                model.safetensors under the model's own names; BLIP and BLIP-2's
                                                first stage besides as transformers' classes, captioner/, retriever/
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mllm import composed, families
from mllm.aligned import Aligned, Aligner
from mllm.aligned.folders import write
from mllm.connectors import bare
from mllm.encoders import Encoder, VisionEncoder
from mllm.folders import IMAGE, Form, form_of, pinpoints, read_into, whole
from mllm.lm import CausalLM
from mllm.model import Model
from mllm.recipe import Recipe, dump, load
from mllm.vlm import VLM, VisionLanguageModel
from pipelines.tiling import AnyTiling, Pad, Resize


def format_of(recipe: Recipe) -> str:
    """Which form a recipe's model has: the kind of one of `mllm.folders`, parts, transformers or whole."""
    if not isinstance(recipe.model, VLM):
        return "whole" if families.family_of(recipe.model) is None else "transformers"
    form = form_of(recipe.model)
    return form.kind if form else "parts"


def export(recipe: Recipe, model: Model, tokenizer: str | None, out: Path) -> Path:
    """Write `model` to the folder `out`, with the tokenizer of the folder `tokenizer`, if any; replaces what was there."""
    scratch = out.with_name(f".{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if not isinstance(model, VisionLanguageModel) or not isinstance(recipe.model, VLM):
        if format_of(recipe) == "transformers":
            families.write(recipe.model, model, _tiling(recipe), Path(tokenizer) if tokenizer else None, scratch)
        else:
            save_file(
                {name: value.clone() for name, value in model.state_dict().items()}, scratch / "model.safetensors"
            )
        for file in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
            if (Path(tokenizer or "") / file).is_file():
                shutil.copyfile(Path(tokenizer or "") / file, scratch / file)
        if isinstance(model, Aligner) and isinstance(recipe.model, Aligned) and tokenizer:
            write(model, recipe.model, tokenizer, scratch)
    else:
        assert tokenizer is not None
        form = form_of(recipe.model)
        if form:
            _whole(form, recipe, model, tokenizer, scratch)
        else:
            _parts(model, tokenizer, recipe.model.lm, scratch)
        if composed.fits(recipe.model):
            text = _tokenizer(tokenizer, recipe.model.lm, (IMAGE,))
            composed.write(recipe.model, model, text, IMAGE, scratch / "whole")
    (scratch / "recipe.json").write_text(dump(recipe))
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
    return out


def _tiling(recipe: Recipe) -> AnyTiling:
    """How pictures are cut at the end."""
    return recipe.tiling_of(recipe.stages[-1])


def _whole(form: Form, recipe: Recipe, model: VisionLanguageModel, tokenizer: str, out: Path) -> None:
    text = _tokenizer(tokenizer, recipe.vlm.lm, form.words)
    whole(form, recipe.vlm, model, _tiling(recipe), text).save_pretrained(out)
    processor = _processor(form, recipe, text)
    (text if processor is None else processor).save_pretrained(out)


def _processor(form: Form, recipe: Recipe, text: Any) -> Any:
    """What makes pixels and tokens of a conversation for transformers; None where ours and its own cut pictures differently."""
    from transformers import IdeficsProcessor, LlavaNextProcessor, LlavaProcessor
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    encoder, tiling = recipe.vlm.encoder, _tiling(recipe)
    assert isinstance(encoder, Encoder)
    side = tiling.size
    numbers: Any = {"image_mean": list(encoder.mean), "image_std": list(encoder.std)}
    square = {"height": side, "width": side}
    cls = encoder.arch.kind == "clip_vision"
    words: Any = {
        "tokenizer": text,
        "patch_size": getattr(encoder.arch, "patch", None),
        "vision_feature_select_strategy": "default" if cls else "full",
        "num_additional_image_tokens": int(cls),
        "chat_template": recipe.vlm.lm.chat.jinja(),
    }
    if form.kind == "llava_next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=pinpoints(tiling), **numbers
        )
        return LlavaNextProcessor(image_processor=images, **words)
    if form.kind == "idefics" and isinstance(tiling, Resize) and tiling.mode == "squash" and recipe.vlm.lm.bos:
        text.bos_token = recipe.vlm.lm.bos  # which its processor writes before every document
        return (
            IdeficsProcessor(IdeficsImageProcessorPil(size=square, **numbers), text) if len(form.words) == 2 else None
        )
    if form.kind != "llava" or not isinstance(tiling, Pad | Resize):
        return None
    crop = isinstance(tiling, Resize) and tiling.mode == "crop"
    images = LlavaImageProcessorPil(
        do_pad=isinstance(tiling, Pad),
        do_center_crop=crop,
        size={"shortest_edge": side} if crop else square,
        crop_size=square,
        **numbers,
    )
    return LlavaProcessor(image_processor=images, **words)


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
    _tokenizer(tokenizer, lm, (IMAGE,)).save_pretrained(out / "lm")
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


def _tokenizer(folder: str, lm: CausalLM, words: tuple[str, ...]) -> Any:
    """The tokenizer with `words` as tokens and the chat template that the model was trained with."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    new = [word for word in words if word not in text.get_vocab()]
    if new:
        text.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
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
    if format_of(recipe) == "transformers":
        return families.read(recipe.model, folder)
    if format_of(recipe) == "whole":
        model = recipe.model.bare().build()
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return model
    if format_of(recipe) == "parts":
        return _from_parts(folder, recipe)
    read = _with_weights(recipe, None, None)
    read_into(read, recipe.vlm, str(folder))
    return read


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
    return replace(spec, encoder=encoder, connector=bare(spec.connector), lm=text, weights=None).build()
