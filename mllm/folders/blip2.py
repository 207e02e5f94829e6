"""BLIP-2 and InstructBLIP as one model of `transformers`, whose parts ours have: encoder, Q-Former, matrix, language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mllm.encoders import Encoder, EvaClip
from mllm.folders.processors import write_blip_pictures
from mllm.fusion import Splice
from mllm.instructed import InstructedQuerying
from mllm.joins import Tiles
from mllm.resamplers import Querying
from mllm.vlm import VLM, VisionLanguageModel


def fits(spec: VLM) -> bool:
    """Whether a model is one that transformers' classes know: EVA-CLIP read whole, a Q-Former, spliced in."""
    encoder = spec.encoder
    if not isinstance(encoder, Encoder) or not isinstance(encoder.arch, EvaClip) or encoder.arch.post_norm:
        return False
    whole = encoder.layer == -1 and encoder.cls == "keep" and encoder.normed and not encoder.interpolate
    between = spec.connector.kind in ("q_former", "instructed_q_former")
    return whole and between and spec.fusion == Splice() and spec.join == Tiles()


def composed(model: VisionLanguageModel, image: int) -> Any:
    """transformers' `Blip2ForConditionalGeneration`, or `InstructBlip...` where the Q-Former reads, with our weights.

    `image` is the id that stands where queries go. The weights are shared, not copied; what is no weight has no memory, so that
    it is good for saving and not for running.
    """
    import transformers

    connector = model.connector
    tower: Any = model.encoder.tower
    assert isinstance(connector, Querying)
    name = "InstructBlip" if isinstance(connector, InstructedQuerying) else "Blip2"
    vision: Any = tower.tower
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision.config.to_dict(),
        qformer_config=connector.model.config.to_dict(),
        text_config=model.lm.model.config.to_dict(),
        num_query_tokens=len(connector.queries),
        image_token_index=image,
    )
    with torch.device("meta"):
        whole = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    state = {"query_tokens": connector.queries.detach()[None]}
    for theirs, ours in (
        ("vision_model", vision),
        ("qformer", connector.model),
        ("language_projection", connector.project),
        ("language_model", model.lm.model),
    ):
        state |= {f"{theirs}.{name}": value for name, value in ours.state_dict().items()}
    whole.load_state_dict(state, strict=True, assign=True)
    whole.tie_weights()
    return whole.eval()


def write(spec: VLM, model: VisionLanguageModel, text: Any, image: str, out: Path) -> None:
    """Write the folder `out`, with the language model's tokenizer `text`, which knows the word `image`.

    InstructBLIP's processor wants the Q-Former's tokenizer besides, which a recipe's annotator names.
    """
    whole = composed(model, text.convert_tokens_to_ids(image))
    if len(text) > model.lm.model.config.vocab_size:
        whole.resize_token_embeddings(len(text), pad_to_multiple_of=64)
    whole.save_pretrained(out)
    text.save_pretrained(out)
    assert isinstance(spec.encoder, Encoder)
    write_blip_pictures(out, getattr(spec.encoder.arch, "image", 224), spec.encoder)
