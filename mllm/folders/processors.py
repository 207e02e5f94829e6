"""What transformers is told beside a model's weights: how text becomes tokens, and pictures pixels, as in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tiling import AnyTiling, Pad, Resize

if TYPE_CHECKING:
    from mllm.encoders import Encoder
    from mllm.lm import CausalLM
    from mllm.vlm import VLM

IMAGE = "<image>"


def tokenizer_of(folder: str, lm: CausalLM, words: tuple[str, ...]) -> Any:
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


def copy_tokenizer(tokenizer: str | None, out: Path) -> None:
    """Lay a tokenizer's files into a folder as they are."""
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        file = Path(tokenizer or "") / name
        if file.is_file():
            shutil.copyfile(file, out / name)


def pinpoints(tiling: AnyTiling) -> list[list[int]]:
    """The canvases of an any_res tiling as transformers has them, height and width in pixels."""
    return [[rows * tiling.size, cols * tiling.size] for rows, cols in getattr(tiling, "canvases", ())]


def llava_processor(spec: VLM, tiling: AnyTiling, text: Any, next_: bool) -> Any:
    """What makes pixels and tokens of a conversation for LLaVA, or LLaVA-NeXT; None where pictures are cut as it does not."""
    from transformers import LlavaNextProcessor, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    encoder, side = spec.tower, tiling.size
    numbers: Any = {"image_mean": list(encoder.mean), "image_std": list(encoder.std)}
    square = {"height": side, "width": side}
    cls = encoder.arch.kind == "clip_vision"
    words: Any = {
        "tokenizer": text,
        "patch_size": getattr(encoder.arch, "patch", None),
        "vision_feature_select_strategy": "default" if cls else "full",
        "num_additional_image_tokens": int(cls),
        "chat_template": spec.lm.chat.jinja(),
    }
    if next_:
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=pinpoints(tiling), **numbers
        )
        return LlavaNextProcessor(image_processor=images, **words)
    if not isinstance(tiling, Pad | Resize):
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


def idefics_processor(spec: VLM, tiling: AnyTiling, text: Any) -> Any:
    """What makes pixels and tokens of pages for Idefics; None where ours was trained on them otherwise."""
    from transformers import IdeficsProcessor
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    if not isinstance(tiling, Resize) or tiling.mode != "squash" or not spec.lm.bos:
        return None
    text.bos_token = spec.lm.bos  # which its processor writes before every document
    numbers: Any = {"image_mean": list(spec.tower.mean), "image_std": list(spec.tower.std)}
    square = {"height": tiling.size, "width": tiling.size}
    return IdeficsProcessor(IdeficsImageProcessorPil(size=square, **numbers), text)


def clip_pictures(model: Any, tiling: Resize) -> Any:
    """What makes pixels of a picture for models of one picture."""
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


def write_blip_pictures(folder: Path, side: int, encoder: Encoder) -> None:
    """Say to BLIP and its kin how pictures are prepared."""
    words = {
        "image_processor_type": "BlipImageProcessor",
        "do_center_crop": False,
        "size": {"height": side, "width": side},
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(words, indent=2))
