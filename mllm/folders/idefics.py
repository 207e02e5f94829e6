"""Idefics (arXiv:2306.16527), the open Flamingo that transformers has: which of ours it is, and the names of its weights.

A CLIP vision transformer read whole, a perceiver without a matrix behind, gated blocks of the language model's own form, a Llama.
Its `<image>` is the mark of an image's place here, and a row of its second table of embeddings, for new words, there.
Around pictures its processor writes `<fake_token_around_image>`, which is the mark around them here (`CrossAttention.around`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from mllm.archs import Llama
from mllm.connectors import Perceiver
from mllm.encoders import ClipVision, Encoder
from mllm.fusion import CrossAttention
from mllm.fusion.cross import around_of
from mllm.joins import Tiles
from pipelines.types import Batch

if TYPE_CHECKING:
    from mllm.vlm import VLM, VisionLanguageModel

FAMILY = "IdeficsForVisionText2Text"
AROUND = "<fake_token_around_image>"
WORDS = "model.embed_tokens.weight"
NEW_WORDS = "model.embed_tokens.additional_embedding.weight"
NEW_HEAD = "lm_head.additional_fc.weight"
MARKS = ("fusion.mark", "fusion.around")


def fits(spec: VLM) -> bool:
    """Whether a model computes what transformers' class does."""
    encoder, connector, fusion, arch = spec.encoder, spec.connector, spec.fusion, spec.lm.arch
    if not isinstance(encoder, Encoder) or not isinstance(encoder.arch, ClipVision) or not isinstance(arch, Llama):
        return False
    if not isinstance(connector, Perceiver) or not isinstance(fusion, CrossAttention):
        return False
    sees = encoder.layer == -1 and encoder.cls == "keep" and not encoder.normed and not encoder.interpolate
    asks = connector.activation == "relu" and not connector.projected and not connector.frames
    asks = asks and fusion.visual_width is None
    heads = fusion.heads == arch.heads == arch.kv_heads and fusion.heads * fusion.head_size == arch.hidden_size
    blocks = fusion.block == "idefics" and fusion.everywhere and arch.layers % fusion.every == 0
    first = fusion.first == 0 or fusion.every == 1
    return sees and asks and heads and blocks and first and not arch.tied and spec.join == Tiles()


def config_of(spec: VLM, model: VisionLanguageModel, words: int) -> Any:
    """transformers' configuration, with `words` new ones."""
    from transformers import IdeficsConfig

    encoder, connector, fusion, arch = spec.encoder, spec.connector, spec.fusion, spec.lm.arch
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder.arch, ClipVision)
    assert isinstance(connector, Perceiver)
    assert isinstance(fusion, CrossAttention)
    assert isinstance(arch, Llama)
    tower = encoder.arch
    return IdeficsConfig(
        vocab_size=arch.vocab_size,
        additional_vocab_size=words,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        rms_norm_eps=arch.norm_eps,
        max_position_embeddings=arch.context,
        rope_parameters=dict(model.lm.model.config.rope_parameters),
        alpha_type="float" if fusion.gates == "scalar" else "vector",
        cross_layer_interval=fusion.every,
        qk_layer_norms=fusion.qk_norm,
        use_resampler=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        vision_config={
            "embed_dim": tower.hidden_size,
            "image_size": tower.image,
            "patch_size": tower.patch,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "hidden_act": tower.activation,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": connector.queries,
            "resampler_depth": connector.depth,
            "resampler_n_heads": connector.heads,
            "resampler_head_dim": connector.head_size,
            "qk_layer_norms_perceiver": connector.qk_norm,
        },
    )


RESAMPLER = {
    "norm_features": "0.context_layer_norm",
    "norm_latents": "0.latents_layer_norm",
    "query": "0.q_proj",
    "key": "0.k_proj",
    "value": "0.v_proj",
    "out": "0.output_proj",
    "norm_query": "0.q_layer_norm",
    "norm_key": "0.k_layer_norm",
    "norm": "1.ln",
    "up": "1.fc",
    "down": "1.c_proj",
}
BLOCK = {
    "norm": "input_layernorm",
    "to_q": "cross_attn.q_proj",
    "to_k": "cross_attn.k_proj",
    "to_v": "cross_attn.v_proj",
    "to_out": "cross_attn.o_proj",
    "norm_q": "cross_attn.q_layer_norm",
    "norm_k": "cross_attn.k_layer_norm",
    "feed_norm": "post_attention_layernorm",
    "up": "mlp.up_proj",
    "up_gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
    "attention_gate": "alpha_cross_attn",
    "feed_gate": "alpha_dense",
}


def theirs(name: str, every: int) -> str:
    """What transformers calls the parameter that we call `name`, with a block before every `every`-th layer."""
    part, _, rest = name.partition(".")
    if part == "encoder":
        return f"model.vision_model.{rest.removeprefix('tower.tower.')}"
    if part == "lm":
        return rest.removeprefix("model.")
    words = rest.split(".")
    if part == "fusion":
        if rest in ("mark", "around"):
            return NEW_WORDS
        _, layer, module, *kind = words
        return ".".join((f"model.gated_cross_attn_layers.{int(layer) // every}", BLOCK[module], *kind))
    if words[0] == "layers":
        _, layer, module, *kind = words
        return ".".join((f"model.perceiver_resampler.blocks.{layer}", RESAMPLER[module], *kind))
    return f"model.perceiver_resampler.{rest.replace('norm.', 'layer_norm.')}"


def whole(spec: VLM, model: VisionLanguageModel, text: Any, image: str) -> Any:
    """transformers' model with the weights of `model`, good for saving; `text` is a tokenizer that has the words `image` and, if
    the model has marks around pictures, `AROUND`.

    A mark becomes its word's embedding: a new row, or the row that the vocabulary has for it.
    """
    import transformers

    assert isinstance(spec.fusion, CrossAttention)
    vocabulary = spec.lm.arch.vocab_size
    config = config_of(spec, model, max(len(text) - vocabulary, 0))
    with torch.device("meta"):
        made = getattr(transformers, FAMILY)(config)
    shapes = {name: value.shape for name, value in made.state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name not in MARKS:
            key = theirs(name, spec.fusion.every)
            state[key] = value.reshape(shapes[key]).contiguous()
    marks, head = {n: v for n, v in model.state_dict().items() if n in MARKS}, state["lm_head.weight"]
    if NEW_WORDS in shapes:
        # A new word's row of the head is the mean of all others, so that none of them is ever the likeliest.
        state[NEW_HEAD] = head.mean(0).expand(shapes[NEW_HEAD]).contiguous()
        state[NEW_WORDS] = head.new_zeros(shapes[NEW_WORDS])
    for name, mark in marks.items():
        place = text.convert_tokens_to_ids(image if name == "fusion.mark" else AROUND)
        at, row = (WORDS, place) if place < vocabulary else (NEW_WORDS, place - vocabulary)
        state[at] = state[at].clone()
        state[at][row] = mark
    made.load_state_dict(state, strict=True, assign=True)
    made.generation_config.eos_token_id = text.eos_token_id
    made.generation_config.pad_token_id = text.pad_token_id
    return made


def as_words(batch: Batch, image: int, around: int | None) -> Int[Tensor, " T"]:
    """The batch's tokens with the ids of `image` and of `AROUND`, if the model has that, where marks stand here."""
    ids = torch.where(batch.visual, image, batch.input_ids)
    return ids if around is None else torch.where(around_of(batch), around, ids)


def looked_at(ids: Int[Tensor, " T"], image: int, pixels: Tensor) -> dict[str, Tensor]:
    """What transformers' class is called with for one document: each position sees the latest of the pictures before it."""
    latest = (ids == image).cumsum(0)[:, None]
    mask = latest == torch.arange(1, len(pixels) + 1, device=ids.device)
    return {"input_ids": ids[None], "pixel_values": pixels[None], "image_attention_mask": mask[None].long()}


def mark(stored: dict[str, Tensor], folder: str, image: str) -> Tensor:
    """The embedding of `image` in a folder that transformers wrote. Raises ValueError where its tokenizer has no such word."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    if image not in vocabulary:
        raise ValueError(
            f"the tokenizer of {folder!r} has no {image}, whose embedding stands at a picture's place or around it; take the "
            "folder's own tokenizer"
        )
    first, place = len(stored[WORDS]), vocabulary[image]
    return stored[WORDS][place] if place < first else stored[NEW_WORDS][place - first]
