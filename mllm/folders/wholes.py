"""Whole vision-language models of transformers: which of ours they are, and the same weights under both names.

llava              an MLP of two matrices beside CLIP or SigLIP            LlavaForConditionalGeneration
llava_next         the same of CLIP, tiles without their padding           LlavaNextForConditionalGeneration
llava_next_video   frames pooled before the MLP                            LlavaNextVideoForConditionalGeneration
internvl           InternViT, 2 x 2 features as one                        InternVLForConditionalGeneration
idefics            a perceiver, gated blocks of cross-attention            IdeficsForVisionText2Text (`mllm.folders.idefics`)

Each but the last before a Llama, Qwen2 or Mistral whose visual tokens stand in the sequence. To add one: its line in `form_of`,
what its config says in `config_of`, and names that differ in `theirs`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mllm.archs import Llama, Mistral, Qwen2
from mllm.connectors import MLP, PixelShuffle, Pool, bare
from mllm.encoders import ClipVision, Encoder, InternViT, SiglipVision
from mllm.folders import idefics
from mllm.folders.processors import IMAGE, idefics_processor, llava_processor, pinpoints, tokenizer_of
from mllm.fusion import CrossAttention, Splice
from mllm.joins import Tiles, Unpad
from mllm.weights import UntrustedCode, refusal
from pipelines.types import Separators

if TYPE_CHECKING:
    from mllm.model import Model
    from mllm.recipe import Recipe
    from mllm.vlm import VLM, VisionLanguageModel
    from pipelines.tiling import AnyTiling

VIDEO = "<video>"
CONTEXT, TAGS = "<IMG_CONTEXT>", ("<img>", "</img>")
"""InternVL's words for a visual token's place and for what stands around a picture."""


@dataclass(frozen=True, slots=True)
class Form:
    """`family` is transformers' class; `words` are tokens that its tokenizer must have, the place of a visual token first."""

    kind: Literal["llava", "llava_next", "llava_next_video", "internvl", "idefics"]
    family: str
    words: tuple[str, ...] = (IMAGE,)

    def write(self, recipe: Recipe, model: Model, tokenizer: str | None, out: Path) -> None:
        """Write transformers' folder, and its processor where it prepares pictures as training did."""
        assert tokenizer is not None
        spec, tiling = recipe.vlm, recipe.tiling_of(recipe.stages[-1])
        trained: Any = model
        text = tokenizer_of(tokenizer, spec.lm, self.words)
        whole(self, spec, trained, tiling, text).save_pretrained(out)
        processor = None
        if self.kind in ("llava", "llava_next"):
            processor = llava_processor(spec, tiling, text, self.kind == "llava_next")
        if self.kind == "idefics" and len(self.words) == 2:  # with marks around pictures, which its processor writes
            processor = idefics_processor(spec, tiling, text)
        (text if processor is None else processor).save_pretrained(out)

    def read(self, recipe: Recipe, folder: Path) -> Model:
        """The model again, from a folder of transformers' class."""
        spec = recipe.vlm
        encoder: Any = spec.encoder
        lm = replace(spec.lm, weights=None, tokenizer=spec.lm.text_codec)
        plain = replace(spec, encoder=encoder.bare(), connector=bare(spec.connector), lm=lm, weights=None)
        model: Any = plain.empty()
        read_into(model, spec, str(folder))
        return model


def form_of(spec: VLM) -> Form | None:
    """The form that a model has in transformers, if it has one."""
    encoder = spec.encoder
    if idefics.fits(spec):
        marks = (IMAGE, idefics.AROUND) if spec.fusion.around else (IMAGE,)  # type: ignore[union-attr]  # a CrossAttention
        return Form("idefics", idefics.FAMILY, marks)
    if not isinstance(encoder, Encoder) or encoder.cls == "keep" or encoder.normed or encoder.interpolate:
        return None
    if spec.fusion != Splice() or not isinstance(spec.lm.arch, Llama | Qwen2 | Mistral):
        return None
    tower, join = encoder.arch, spec.join
    clip = isinstance(tower, ClipVision)
    if spec.connector == MLP(depth=2):
        if join == Tiles() and (clip or isinstance(tower, SiglipVision)):
            return Form("llava", "LlavaForConditionalGeneration")
        if join == Unpad() and clip:
            return Form("llava_next", "LlavaNextForConditionalGeneration")
    if isinstance(spec.connector, Pool) and spec.connector.before and spec.connector.depth == 2 and clip:
        return (
            Form("llava_next_video", "LlavaNextVideoForConditionalGeneration", (VIDEO, IMAGE))
            if join == Tiles()
            else None
        )
    if spec.connector == PixelShuffle() and isinstance(tower, InternViT) and tower.image // tower.patch % 2 == 0:
        if join == Tiles(separators=Separators(picture=2)):
            return Form("internvl", "InternVLForConditionalGeneration", (CONTEXT, *TAGS))
        if join == Tiles():
            return Form("internvl", "InternVLForConditionalGeneration", (CONTEXT,))
    return None


def check_form(spec: VLM) -> Form:
    """The form of a model that names weights of the whole. Raises ValueError where transformers has no class for it."""
    form = form_of(spec)
    if form is None:
        raise ValueError(
            f"weights={spec.weights!r} are of a whole model of transformers, and none of the classes known here is this one; "
            "name weights of model.encoder and model.lm, or take the parts of LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video, InternVL or "
            "Idefics"
        )
    return form


def config_of(form: Form, spec: VLM, model: VisionLanguageModel, tiling: AnyTiling, ids: list[int]) -> Any:
    """transformers' configuration of the whole; `ids` are those of the form's words."""
    import transformers

    encoder: Any = spec.encoder
    tower: Any = model.encoder.tower
    text = model.lm.model.config
    shared = {
        # Copies: the composed model sets how its parts attend, and would do so in the trained model too.
        "vision_config": deepcopy(tower.tower.config),
        "text_config": deepcopy(text),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": encoder.layer,
        "vision_feature_select_strategy": "default" if tower.first else "full",
        "tie_word_embeddings": text.tie_word_embeddings,
        "image_seq_length": spec.connector.tokens(encoder.tokens(tiling.size)),
    }
    match form.kind:
        case "llava":
            return transformers.LlavaConfig(image_token_index=ids[0], **shared)
        case "llava_next":
            return transformers.LlavaNextConfig(
                image_token_index=ids[0], image_grid_pinpoints=pinpoints(tiling), **shared
            )
        case "llava_next_video":
            stride: Any = spec.connector.stride  # type: ignore[union-attr]  # a Pool, as `form_of` found
            return transformers.LlavaNextVideoConfig(
                image_token_index=ids[1],  # of which there is none: pictures are videos of one frame here
                video_token_index=ids[0],
                spatial_pool_mode="average",
                spatial_pool_stride=stride,
                **shared,
            )
        case "internvl":
            return transformers.InternVLConfig(image_token_id=ids[0], downsample_ratio=0.5, **shared)
        case "idefics":
            raise ValueError(
                "mllm.folders.idefics says the configuration of an Idefics, whose parts are no models of their own"
            )


MATRICES = {
    "layers.0": "linear_1",
    "layers.1": "linear_2",
    "mlp.layers.0": "linear_1",
    "mlp.layers.1": "linear_2",
    "norm": "layer_norm",
}


def theirs(name: str) -> str:
    """What transformers calls the parameter that we call `name`, which is no mark of the join's."""
    part, _, rest = name.partition(".")
    if part == "encoder":
        return f"model.vision_tower.{rest.removeprefix('tower.tower.')}"
    if part == "connector":
        layer, _, kind = rest.rpartition(".")
        return f"model.multi_modal_projector.{MATRICES[layer]}.{kind}"
    inner = rest.removeprefix("model.")
    return inner if inner.startswith("lm_head") else f"model.language_model.{inner.removeprefix('model.')}"


def whole(form: Form, spec: VLM, model: VisionLanguageModel, tiling: AnyTiling, text: Any) -> Any:
    """transformers' model with the weights of `model`, ready to be saved; `text` is a tokenizer that has the form's words."""
    import transformers

    if form.kind == "idefics":
        return idefics.whole(spec, model, text, IMAGE)
    config = config_of(form, spec, model, tiling, text.convert_tokens_to_ids(list(form.words)))
    with torch.device("meta"):
        made = getattr(transformers, form.family)(config)
    state = {theirs(name): value.contiguous() for name, value in model.state_dict().items() if name != "join.marks"}
    marks = model.join.marks
    if form.kind == "llava_next" and marks is not None:
        state["model.image_newline"] = marks.detach()[0].clone()
    if form.kind == "llava_next_video":  # which it has and, for videos, never uses
        state["model.image_newline"] = torch.zeros(model.lm.width)
    made.load_state_dict(state, strict=True, assign=True)
    made.tie_weights()
    if len(text) > config.text_config.vocab_size:
        made.resize_token_embeddings(len(text), pad_to_multiple_of=64)
    if form.kind == "internvl" and marks is not None:
        with torch.no_grad():
            made.get_input_embeddings().weight[text.convert_tokens_to_ids(list(TAGS))] = marks
    made.generation_config.eos_token_id = text.eos_token_id
    made.generation_config.pad_token_id = text.pad_token_id
    return made


def read_into(model: VisionLanguageModel, spec: VLM, folder: str) -> None:
    """Give `model` the weights of a folder that transformers wrote. Raises ValueError where the folder's are not of its shape.

    Words that the folder's vocabulary has beyond the model's are left away: places of visual tokens, and rows that fill up.
    """
    import transformers

    form = check_form(spec)
    stored = _stored(getattr(transformers, form.family), folder)
    marks = _marks(form, stored, folder)
    found: dict[str, Tensor] = {}
    for name, own in model.state_dict().items():
        if name == "join.marks":
            value = marks
        elif name in idefics.MARKS:
            value = idefics.mark(stored, folder, IMAGE if name == "fusion.mark" else idefics.AROUND)
        elif isinstance(spec.fusion, CrossAttention):
            value = stored.get(idefics.theirs(name, spec.fusion.every))
            value = value.flatten() if value is not None and name.endswith("_gate") else value
        else:
            value = stored.get(theirs(name))
        if value is not None and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = value[: len(own)]
        if value is None or value.shape != own.shape:
            has = "nothing" if value is None else f"{tuple(value.shape)}"
            raise ValueError(
                f"weights {folder!r} have {has} where the recipe has {name} of {tuple(own.shape)}; mend the recipe's numbers"
            )
        found[name] = value
    model.load_state_dict(found, strict=True)


def _stored(family: Any, folder: str) -> dict[str, Tensor]:
    """State of the model in `folder`, float32. Raises UntrustedCode; ValueError where it is of another class or lacks some."""
    import transformers

    if why := refusal(folder, trusted=False):
        raise UntrustedCode(why)
    has = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    if has != family.config_class.model_type:
        raise ValueError(
            f"weights {folder!r} hold a {has!r} and the recipe's model is a {family.config_class.model_type!r}"
        )
    model, told = family.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"weights {folder!r} lack {', '.join(missing[:3])}; name a folder that has all of the model")
    return model.state_dict()


def _marks(form: Form, stored: dict[str, Tensor], folder: str) -> Tensor | None:
    """The join's marks, (n, D), from where the form has them."""
    if form.kind == "llava_next":
        return stored["model.image_newline"][None]
    if form.kind != "internvl" or len(form.words) == 1:
        return None
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    if missing := [word for word in TAGS if word not in vocabulary]:
        raise ValueError(
            f"the tokenizer of {folder!r} has no {' and no '.join(missing)}, whose embeddings stand around a picture; take the "
            "folder's own tokenizer, or join tiles without separators"
        )
    return stored["model.language_model.embed_tokens.weight"][[vocabulary[word] for word in TAGS]]
