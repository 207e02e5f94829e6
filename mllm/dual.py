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

from mllm.encoders import OPENAI_MEAN, OPENAI_STD, Eva02, EvaClip, Folder
from mllm.layers import TOY, Layers, Patched
from mllm.model import RGB, Model, PictureModel, Words
from mllm.pairs import Pairs, Texts, first_pictures, texts_of
from mllm.text import DOCUMENTS, register_documents
from mllm.towers import ViTTower
from mllm.weights import agree, load
from ops.attention import Backend
from ops.images import normalize
from pipelines.types import Batch, spec

ATTENTIONS = {"text_config": DOCUMENTS, "vision_config": "sdpa"}


@spec
class CLIP(Patched):
    """CLIP (arXiv:2103.00020): a ViT read at its CLS token, a causal text transformer read at the end mark, two projections.

    `activation` is quick_gelu in OpenAI's models and gelu in OpenCLIP's larger ones. `temperature` is where the learned
    temperature begins; logits are multiplied by at most 100 (section 2.5).
    """

    kind: Literal["clip"] = "clip"
    vision: Layers
    text: Layers
    projection: int
    vocab_size: int = 49_408
    context: int = 77
    activation: str = "quick_gelu"
    temperature: Annotated[float, Field(gt=0)] = 0.07

    def config(self) -> Any:
        from transformers import CLIPConfig

        return CLIPConfig(
            text_config={
                **self.text.words(),
                "vocab_size": self.vocab_size,
                "max_position_embeddings": self.context,
                "hidden_act": self.activation,
                "projection_dim": self.projection,
            },
            vision_config={
                **self.vision.words(),
                **self.sizes(),
                "hidden_act": self.activation,
                "projection_dim": self.projection,
            },
            projection_dim=self.projection,
            logit_scale_init_value=math.log(1 / self.temperature),
        )

    def build(self) -> Any:
        from transformers import CLIPModel

        register_documents()
        return CLIPModel._from_config(self.config(), attn_implementation=ATTENTIONS)

    def load(self, folder: str) -> Any:
        from transformers import CLIPModel

        register_documents()
        return load(CLIPModel, "AutoModel", folder, attn_implementation=ATTENTIONS, dtype=torch.float32)


@spec
class SigLIP(Patched):
    """SigLIP (arXiv:2303.15343): a ViT without CLS read by attention of one query, a text transformer that sees both ways.

    Texts are filled up to `context` with `pad`, which takes part in attention as it did in training, and are read at the last
    position. `temperature` and `bias` are where the learned ones begin (section 3.2).
    """

    kind: Literal["siglip"] = "siglip"
    vision: Layers
    text: Layers
    vocab_size: int = 32_000
    context: int = 64
    pad: int = 1
    temperature: Annotated[float, Field(gt=0)] = 0.1
    bias: float = -10.0

    def config(self) -> Any:
        from transformers import SiglipConfig

        return SiglipConfig(
            text_config={
                **self.text.words(),
                "vocab_size": self.vocab_size,
                "max_position_embeddings": self.context,
                "projection_size": self.vision.hidden_size,
            },
            vision_config={**self.vision.words(), **self.sizes()},
        )

    def build(self) -> Any:
        from transformers import SiglipModel

        model = SiglipModel._from_config(self.config(), attn_implementation="sdpa")
        with torch.no_grad():
            model.logit_scale.fill_(math.log(1 / self.temperature))
            model.logit_bias.fill_(self.bias)
        return model

    def load(self, folder: str) -> Any:
        from transformers import SiglipModel

        return load(SiglipModel, "AutoModel", folder, attn_implementation="sdpa", dtype=torch.float32)


@spec
class EvaCLIP:
    """EVA-CLIP (arXiv:2303.15389): CLIP whose vision transformer is EVA's, read at its CLS token, and projected with a bias.

    `begins` names the weights that it begins from, those of EVA's masked pictures; None is from scratch.
    """

    kind: Literal["eva_clip"] = "eva_clip"
    vision: Annotated[EvaClip | Eva02, Field(discriminator="kind")]
    text: Layers
    projection: int
    begins: str | None = None
    vocab_size: int = 49_408
    context: int = 77
    temperature: Annotated[float, Field(gt=0)] = 0.07

    @property
    def patch(self) -> int:
        return self.vision.patch

    @property
    def image(self) -> int:
        return self.vision.image

    @property
    def cells(self) -> int:
        return self.vision.tokens(self.image)

    def build(self, folder: Folder) -> Any:
        tower = self.vision.build(folder(self.begins) if self.begins else None, -1, "keep", normed=True)
        return EvaTowers(self, tower)


Arch = Annotated[CLIP | SigLIP | EvaCLIP, Field(discriminator="kind")]

LARGEST_SCALE = 100.0
"""CLIP multiplies no logit by more (arXiv:2103.00020, 2.5); here the scale has no gradient beyond."""


@spec
class DualTower(PictureModel):
    """Two towers and the way text is written for them.

    `tokenizer` names a folder with a `tokenizer.json` and defaults to `weights`. A document's text ends with `eos`, which
    CLIP reads it by.
    """

    kind: Literal["dual_tower"] = "dual_tower"
    arch: Arch
    tokenizer: str | None = None
    bos: str | None = None
    eos: str | None = "<|endoftext|>"
    mean: RGB = OPENAI_MEAN
    std: RGB = OPENAI_STD

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.weights is None:
            raise ValueError("a text tower without weights needs a tokenizer; set model.tokenizer to a folder's name")

    @property
    def words(self) -> Words:
        name = self.tokenizer or self.weights
        return Words(tokenizer=name, bos=self.bos, eos=self.eos, vocabulary=self.arch.vocab_size)

    @property
    def reads(self) -> tuple[str, ...]:
        begins = self.arch.begins if isinstance(self.arch, EvaCLIP) else None
        return tuple(name for name in (self.weights, begins) if name)

    @property
    def learns(self) -> tuple[str, ...]:
        return ("contrastive",)

    def tiny(self) -> Self:
        words = {"text": TOY, "vocab_size": 2048, "context": 24}
        match self.arch:
            case EvaCLIP() as arch:
                arch = replace(arch, vision=arch.vision.tiny(), projection=16, begins=None, **words)
            case CLIP() as arch:
                arch = replace(arch, vision=TOY, patch=16, image=32, projection=16, **words)
            case SigLIP() as arch:
                arch = replace(arch, vision=TOY, patch=16, image=32, **words)
        return replace(self, arch=arch, weights=None, tokenizer="example-bpe", bos=None, eos="<|im_end|>")

    def build(self, folder: Folder = str) -> DualEncoder:
        return DualEncoder(self, folder)

    def bare(self) -> Self:
        arch = replace(self.arch, begins=None) if isinstance(self.arch, EvaCLIP) else self.arch
        return replace(self, arch=arch, weights=None, tokenizer=self.words.tokenizer)


class EvaTowers(nn.Module):
    """The parts of an EVA-CLIP under CLIP's names."""

    def __init__(self, arch: EvaCLIP, tower: ViTTower) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        register_documents()
        words: dict[str, Any] = {**arch.text.words(), "vocab_size": arch.vocab_size, "hidden_act": "gelu"}
        config = CLIPTextConfig(**words, max_position_embeddings=arch.context, projection_dim=arch.projection)
        self.vision_model = tower
        self.text_model = CLIPTextModel._from_config(config, attn_implementation=DOCUMENTS)
        self.visual_projection = nn.Linear(arch.vision.width, arch.projection)
        self.text_projection = nn.Linear(arch.text.hidden_size, arch.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / arch.temperature)))


class DualEncoder(Model):
    """`pairs(batch)`: embeddings of pictures and their texts; `model(batch)` gives those of the pictures, (P, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: DualTower, folder: Folder) -> None:
        super().__init__()
        self.towers = _towers(spec, folder)
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
        if not isinstance(self.arch, SigLIP):
            scale = scale.clamp(max=math.log(LARGEST_SCALE))
            bias = scale.new_zeros(1)
        else:
            bias = self.towers.logit_bias
        return Pairs(images, words, documents, scale.exp(), bias)

    def _pictures(self, tiles: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        """An embedding of unit length for each tile."""
        tower = self.towers.vision_model
        pixels = normalize(tiles, self.mean, self.std).to(next(tower.parameters()).dtype)
        if isinstance(self.arch, EvaCLIP):
            return F.normalize(self.towers.visual_projection(tower(pixels)[:, 0]), dim=-1)
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
            "vision.layers": [p for layer in self._blocks for p in layer.parameters()],
            "text": text,
            "text.embeddings": list(towers.text_model.embeddings.parameters()),
            "text.layers": list(towers.text_model.encoder.layers.parameters()),
            "head": [p for p in towers.parameters() if id(p) not in inside],
        }

    @property
    def _blocks(self) -> list[nn.Module]:
        """Layers of the vision tower."""
        tower = self.towers.vision_model
        return tower.units() if isinstance(tower, ViTTower) else list(tower.encoder.layers)

    def units(self) -> list[nn.Module]:
        return [*self._blocks, *self.towers.text_model.encoder.layers]

    def attend_by(self, backend: Backend | None) -> None:
        self.backend = backend


def _towers(spec: DualTower, folder: Folder) -> Any:
    """The towers of a spec. Raises ValueError where weights are not of the shape that it says."""
    arch = spec.arch
    if isinstance(arch, EvaCLIP):
        if spec.weights is not None:
            raise ValueError(
                f"weights={spec.weights!r}: transformers has no EVA-CLIP; name EVA's weights in model.arch.begins"
            )
        return arch.build(folder)
    if spec.weights is None:
        return arch.build()
    towers = arch.load(folder(spec.weights))
    fresh = arch.config()
    for side, field in (("vision_config", "image_size"), ("text_config", "vocab_size")):
        agree(
            spec.weights,
            getattr(fresh, side),
            getattr(towers.config, side),
            ("hidden_size", "num_hidden_layers", field),
        )
    return towers
