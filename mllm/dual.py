"""Dual towers: an embedding for a picture and one for a text, in one space (CLIP, OpenCLIP, SigLIP).

The towers are those of `transformers`; texts go through theirs as packs, by this project's attention.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from mllm.encoders import Folder
from mllm.model import Model, ModelSpec, Words, check_tiles
from mllm.pairs import Pairs, Texts, first_pictures, texts_of
from mllm.text import DOCUMENTS, register_documents
from mllm.weights import load
from ops.attention import Backend
from ops.images import normalize
from pipelines.tiling import Tiling
from pipelines.types import Batch, VisionLayout, spec

ATTENTIONS = {"text_config": DOCUMENTS, "vision_config": "sdpa"}


@spec
class Layers:
    """The shape of one tower's transformer."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int

    def words(self) -> dict[str, Any]:
        """What transformers' configurations call them."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
        }


@spec
class CLIP:
    """CLIP (arXiv:2103.00020): a ViT read at its CLS token, a causal text transformer read at the end mark, two projections.

    `activation` is quick_gelu in OpenAI's models and gelu in OpenCLIP's larger ones. `temperature` is where the learned
    temperature begins; logits are multiplied by at most 100 (section 2.5).
    """

    kind: Literal["clip"] = "clip"
    vision: Layers
    text: Layers
    projection: int
    patch: int
    image: int = 224
    vocab_size: int = 49_408
    context: int = 77
    activation: str = "quick_gelu"
    temperature: Annotated[float, Field(gt=0)] = 0.07

    def build(self) -> Any:
        from transformers import CLIPConfig, CLIPModel

        register_documents()
        config = CLIPConfig(
            text_config={
                **self.text.words(),
                "vocab_size": self.vocab_size,
                "max_position_embeddings": self.context,
                "hidden_act": self.activation,
                "projection_dim": self.projection,
            },
            vision_config={
                **self.vision.words(),
                "patch_size": self.patch,
                "image_size": self.image,
                "hidden_act": self.activation,
                "projection_dim": self.projection,
            },
            projection_dim=self.projection,
            logit_scale_init_value=math.log(1 / self.temperature),
        )
        return CLIPModel._from_config(config, attn_implementation=ATTENTIONS)

    def load(self, folder: str) -> Any:
        from transformers import CLIPModel

        register_documents()
        return load(CLIPModel, "AutoModel", folder, attn_implementation=ATTENTIONS, dtype=torch.float32)


@spec
class SigLIP:
    """SigLIP (arXiv:2303.15343): a ViT without CLS read by attention of one query, a text transformer that sees both ways.

    Texts are filled up to `context` with `pad`, which takes part in attention as it did in training, and are read at the last
    position. `temperature` and `bias` are where the learned ones begin (section 3.2).
    """

    kind: Literal["siglip"] = "siglip"
    vision: Layers
    text: Layers
    patch: int
    image: int = 224
    vocab_size: int = 32_000
    context: int = 64
    pad: int = 1
    temperature: Annotated[float, Field(gt=0)] = 0.1
    bias: float = -10.0

    def build(self) -> Any:
        from transformers import SiglipConfig, SiglipModel

        config = SiglipConfig(
            text_config={
                **self.text.words(),
                "vocab_size": self.vocab_size,
                "max_position_embeddings": self.context,
                "projection_size": self.vision.hidden_size,
            },
            vision_config={**self.vision.words(), "patch_size": self.patch, "image_size": self.image},
        )
        model = SiglipModel._from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            model.logit_scale.fill_(math.log(1 / self.temperature))
            model.logit_bias.fill_(self.bias)
        return model

    def load(self, folder: str) -> Any:
        from transformers import SiglipModel

        return load(SiglipModel, "AutoModel", folder, attn_implementation="sdpa", dtype=torch.float32)


Arch = Annotated[CLIP | SigLIP, Field(discriminator="kind")]

LARGEST_SCALE = 100.0
"""CLIP multiplies no logit by more (arXiv:2103.00020, 2.5); here the scale has no gradient beyond."""


@spec
class DualTower(ModelSpec):
    """Two towers and the way text is written for them. `weights` None trains them from scratch.

    `tokenizer` names a folder with a `tokenizer.json` and defaults to `weights`. A document's text ends with `eos`, which
    CLIP reads it by. `mean` and `std` normalise RGB in [0, 1].
    """

    kind: Literal["dual_tower"] = "dual_tower"
    arch: Arch
    weights: str | None = None
    tokenizer: str | None = None
    bos: str | None = None
    eos: str | None = "<|endoftext|>"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.weights is None:
            raise ValueError("a text tower without weights needs a tokenizer; set model.tokenizer to a folder's name")

    @property
    def words(self) -> Words:
        name = self.tokenizer or self.weights
        return Words(tokenizer=name, bos=self.bos, eos=self.eos, vocabulary=self.arch.vocab_size)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.weights,) if self.weights else ()

    @property
    def learns(self) -> tuple[str, ...]:
        return ("contrastive",)

    @property
    def side(self) -> int:
        return self.arch.image

    def tiny(self) -> Self:
        shape = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
        arch = replace(self.arch, vision=shape, text=shape, patch=16, image=32, vocab_size=2048, context=24)
        if isinstance(arch, CLIP):
            arch = replace(arch, projection=16)
        return replace(self, arch=arch, weights=None, tokenizer="example-bpe", bos=None, eos="<|im_end|>")

    def layout(self, tiling: Tiling) -> VisionLayout:
        check_tiles(tiling, self.arch.image, "the vision tower")
        return VisionLayout(shape=tiling.shape, tokens_per_tile=(self.arch.image // self.arch.patch) ** 2)

    def build(self, folder: Folder = str) -> DualEncoder:
        return DualEncoder(self, folder)

    def bare(self) -> Self:
        return replace(self, weights=None, tokenizer=self.words.tokenizer)


class DualEncoder(Model):
    """`pairs(batch)`: embeddings of pictures and their texts; `model(batch)` gives those of the pictures, (P, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: DualTower, folder: Folder) -> None:
        super().__init__()
        self.towers = spec.arch.build() if spec.weights is None else spec.arch.load(folder(spec.weights))
        config = self.towers.config
        for name, has, wanted in (
            ("vision_config.hidden_size", config.vision_config.hidden_size, spec.arch.vision.hidden_size),
            ("vision_config.image_size", config.vision_config.image_size, spec.arch.image),
            ("text_config.hidden_size", config.text_config.hidden_size, spec.arch.text.hidden_size),
            ("text_config.vocab_size", config.text_config.vocab_size, spec.arch.vocab_size),
        ):
            if has != wanted:
                raise ValueError(
                    f"weights {spec.weights!r} have {name}={has} and the recipe's arch says {wanted}; mend the arch"
                )
        # Shards have at least one dimension.
        self.towers.logit_scale = nn.Parameter(self.towers.logit_scale.detach().reshape(1))
        self.arch = spec.arch
        self.backend: Backend | None = None
        self.border = nn.Identity()
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    def forward(self, batch: Batch) -> Float[Tensor, "P D"]:
        return self.pairs(batch).images

    def pairs(self, batch: Batch) -> Pairs:
        """The pairs of the documents that have both a picture and text: the first picture of each, and all its text."""
        pictures, texts = first_pictures(batch), texts_of(batch, self.arch.context)
        of_tiles = self.border(self._pictures(batch.tiles))
        of_texts = self._texts(texts)
        both = torch.isin(pictures.documents, texts.documents)
        documents = pictures.documents[both]
        images = of_tiles[pictures.tiles[both]]
        words = of_texts[: len(texts.documents)][torch.isin(texts.documents, documents)]
        scale = self.towers.logit_scale
        if isinstance(self.arch, CLIP):
            scale = scale.clamp(max=math.log(LARGEST_SCALE))
            bias = scale.new_zeros(1)
        else:
            bias = self.towers.logit_bias
        return Pairs(images, words, documents, scale.exp(), bias)

    def _pictures(self, tiles: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        """An embedding of unit length for each tile."""
        tower = self.towers.vision_model
        pixels = normalize(tiles, self.mean, self.std).to(tower.embeddings.patch_embedding.weight.dtype)
        x = tower.embeddings(pixels)
        if isinstance(self.arch, CLIP):
            x = tower.pre_layrnorm(x)
        for layer in tower.encoder.layers:
            x = layer(x, attention_mask=None)
        if isinstance(self.arch, CLIP):
            x = self.towers.visual_projection(tower.post_layernorm(x[:, 0]))
        else:
            x = tower.head(tower.post_layernorm(x))
        return F.normalize(x, dim=-1)

    def _texts(self, texts: Texts) -> Float[Tensor, "S D"]:
        """An embedding of unit length for each text, of which there is at least a blank one."""
        tower = self.towers.text_model
        look = tower.embeddings  # whose own forward takes no more tokens than one document may have
        if isinstance(self.arch, SigLIP):  # all of one length, so that they need no bounds
            ids = texts.ids.new_full((len(texts.cu_seqlens) - 1, self.arch.context), self.arch.pad)
            ids[texts.owner, texts.positions] = texts.ids
            x = look.token_embedding(ids) + look.position_embedding.weight
            for layer in tower.encoder.layers:
                x = layer(x, None)
            last = tower.head(tower.final_layer_norm(x[:, -1]))
        else:
            bounds, how = texts.cu_seqlens, {"longest": texts.max_seqlen, "causal": True, "backend": self.backend}
            x = (look.token_embedding(texts.ids) + look.position_embedding(texts.positions))[None]
            for layer in tower.encoder.layers:
                x = layer(x, None, documents=bounds, **how)
            last = self.towers.text_projection(tower.final_layer_norm(x[0][bounds[1:].long() - 1]))
        return F.normalize(last, dim=-1)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        towers = self.towers
        vision, text = list(towers.vision_model.parameters()), list(towers.text_model.parameters())
        inside = {id(p) for p in (*vision, *text)}
        return {
            "vision": vision,
            "vision.layers": list(towers.vision_model.encoder.layers.parameters()),
            "text": text,
            "text.embeddings": list(towers.text_model.embeddings.parameters()),
            "text.layers": list(towers.text_model.encoder.layers.parameters()),
            "head": [p for p in towers.parameters() if id(p) not in inside],
        }

    def units(self) -> list[nn.Module]:
        return [*self.towers.vision_model.encoder.layers, *self.towers.text_model.encoder.layers]

    def attend_by(self, backend: Backend | None) -> None:
        self.backend = backend
