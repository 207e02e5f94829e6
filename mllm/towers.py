"""Vision transformers: their shapes, known without a download, and `transformers`' classes behind them.

All are read alike: patches become a sequence, layers run up to the one that is read, CLS is dropped or kept. What differs is
where each class keeps its layers, and whether a CLS stands before the patches. To add one: a spec that is a `ViTShape`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mllm.depth import branches_of
from mllm.weights import TOWER_FIELDS, agree, load
from ops.visual import interpolated_positions
from pipelines.types import spec

Cls = Literal["drop", "keep"]
Grid = tuple[int, int]
"""Rows and columns of patches."""


NOTHING: Mapping[str, bool] = {}


@spec
class ViTShape:
    """What shapes of vision transformers have in common; `layers` and `image` change when the tower is made small."""

    hidden_size: int
    layers: int
    heads: int
    patch: int
    image: int

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self.hidden_size

    def tokens(self, tile: int, interpolate: bool = False) -> int:
        """Patches of a tile. Raises ValueError, see `patches_of`."""
        return patches_of(self, tile, interpolate)

    def tiny(self) -> Self:
        """The same structure at a size for tests."""
        return toy(self)

    def words(self) -> dict[str, Any]:
        """What `transformers`' configurations call the numbers."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "patch_size": self.patch,
            "image_size": self.image,
        }

    def config(self) -> Any:
        """transformers' configuration."""
        raise NotImplementedError


def patches_of(arch: ViTShape, tile: int, interpolate: bool) -> int:
    """Patches of a tile `tile` pixels a side. Raises ValueError when the tower was made for another size and may not stretch
    its positions.
    """
    if tile != arch.image and not interpolate:
        raise ValueError(
            f"tiling cuts tiles of {tile} pixels and the encoder takes {arch.image}; set the tiling's size to {arch.image}, "
            "or encoder.interpolate to stretch its positions"
        )
    return (tile // arch.patch) ** 2


def toy(arch: Any, **fields: Any) -> Any:
    """The same structure at a size for tests: two or three narrow layers, a grid of 4 x 4 patches (5 x 5 where it is odd)."""
    odd = arch.image // arch.patch % 2
    small = {
        "hidden_size": 32,
        "layers": 3,
        "heads": 4,
        "intermediate_size": 64,
        "patch": 8,
        "image": 40 if odd else 32,
    }
    return replace(arch, **(small | fields))


def made(arch: ViTShape, name: str, weights: str | None, left_out: Mapping[str, bool] = NOTHING, **options: Any) -> Any:
    """transformers' class `name` in the shape of `arch`, or with `weights`, which must have it. Raises ValueError.

    `left_out` are words of the config, and `options` of the class, that leave parts away.
    """
    import transformers

    kind = getattr(transformers, name)
    if weights is None:
        return kind._from_config(arch.config(), attn_implementation="sdpa", **options)
    tower = load(kind, "AutoModel", weights, attn_implementation="sdpa", dtype=torch.float32, **left_out, **options)
    agree(weights, arch.config(), tower.config, TOWER_FIELDS)
    return tower


@spec
class ClipVision(ViTShape):
    """CLIP's vision transformer (arXiv:2103.00020), OpenCLIP's too: `patch` pixels a side, learned positions, CLS first."""

    kind: Literal["clip_vision"] = "clip_vision"
    intermediate_size: int
    activation: str = "quick_gelu"

    def config(self) -> Any:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            **self.words(),
            intermediate_size=self.intermediate_size,
            hidden_act=self.activation,
        )

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        return ClipTower(made(self, "CLIPVisionModel", weights), layer, cls, normed)


@spec
class SiglipVision(ViTShape):
    """SigLIP's vision transformer (arXiv:2303.15343): learned positions, no CLS. Its pooling head is left away."""

    kind: Literal["siglip_vision"] = "siglip_vision"
    intermediate_size: int

    def config(self) -> Any:
        from transformers import SiglipVisionConfig

        return SiglipVisionConfig(
            **self.words(),
            intermediate_size=self.intermediate_size,
            vision_use_head=False,
        )

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        return SiglipTower(made(self, "SiglipVisionModel", weights, {"vision_use_head": False}), layer, cls, normed)


@spec
class Dinov2(ViTShape):
    """DINOv2 (arXiv:2304.07193): a self-supervised transformer with layer scale, CLS first; `swiglu` in its giant form."""

    kind: Literal["dinov2"] = "dinov2"
    patch: int = 14
    image: int = 518
    mlp_ratio: int = 4
    swiglu: bool = False

    @property
    def intermediate_size(self) -> int:
        return self.mlp_ratio * self.hidden_size

    def tiny(self) -> Self:
        return replace(
            self, hidden_size=32, layers=3, heads=4, patch=8, image=40 if self.image // self.patch % 2 else 32
        )

    def config(self) -> Any:
        from transformers import Dinov2Config

        return Dinov2Config(
            **self.words(),
            mlp_ratio=self.mlp_ratio,
            use_swiglu_ffn=self.swiglu,
            use_mask_token=False,
        )

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        return DinoTower(made(self, "Dinov2Model", weights, {"use_mask_token": False}), layer, cls, normed)


@spec
class InternViT(ViTShape):
    """InternViT (arXiv:2312.14238, 3.1): layer scale; its 6B form has `qk_norm` and RMSNorm, the distilled 300M neither."""

    kind: Literal["intern_vit"] = "intern_vit"
    intermediate_size: int
    patch: int = 14
    image: int = 448
    qk_norm: bool = False
    qkv_bias: bool = True
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"

    def config(self) -> Any:
        from transformers import InternVLVisionConfig

        square: dict[str, Any] = {"patch_size": [self.patch] * 2, "image_size": [self.image] * 2}
        return InternVLVisionConfig(
            **{**self.words(), **square},
            intermediate_size=self.intermediate_size,
            use_qk_norm=self.qk_norm,
            attention_bias=self.qkv_bias,
            norm_type=self.norm,
        )

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        return InternTower(made(self, "InternVLVisionModel", weights), layer, cls, normed)


@spec
class EvaClip(ViTShape):
    """EVA-CLIP (arXiv:2303.15389): g/14 as BLIP-2 has it, without the last layer; with `post_norm` E/14, as CogVLM has it.

    `post_norm` puts each LayerNorm behind its branch: x + norm(attention(x)) (EVA2-CLIP-E; CogVLM's `visual.py`).
    """

    kind: Literal["eva_clip"] = "eva_clip"
    intermediate_size: int
    patch: int = 14
    image: int = 224
    post_norm: bool = False

    def config(self) -> Any:
        from transformers import Blip2VisionConfig

        return Blip2VisionConfig(
            **self.words(),
            intermediate_size=self.intermediate_size,
            initializer_range=0.02,  # transformers' own default is as good as zero, for weights that are loaded anyway
        )

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        model = made(self, "Blip2VisionModel", weights)
        if self.post_norm:
            for block in model.encoder.layers:
                block.__class__ = _post_norm_layer()  # the same weights under the same names, in another order
        tower = EvaTower(model, layer, cls, normed)
        tower.post_norm = self.post_norm
        return tower


@cache
def _post_norm_layer() -> type[nn.Module]:
    from transformers.models.blip_2.modeling_blip_2 import Blip2EncoderLayer

    class PostNormLayer(Blip2EncoderLayer):
        def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
            attended, _ = self.self_attn(hidden_states, **options)
            hidden_states = hidden_states + self.layer_norm1(attended)
            return hidden_states + self.layer_norm2(self.mlp(hidden_states))

    return PostNormLayer


@spec
class ViT(ViTShape):
    """The vision transformer of arXiv:2010.11929, trained with labels: learned positions, CLS first."""

    kind: Literal["vit"] = "vit"
    intermediate_size: int
    patch: int = 16
    image: int = 224

    def config(self) -> Any:
        from transformers import ViTConfig

        return ViTConfig(
            **self.words(),
            intermediate_size=self.intermediate_size,
        )

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        return PlainTower(made(self, "ViTModel", weights, add_pooling_layer=False), layer, cls, normed)


class ViTTower(nn.Module):
    """Runs only the layers below the one that is read.

    `layer` counts hidden states as transformers does: 0 the embeddings, -1 the last layer's output, before the final norm;
    `normed` applies that norm to what is read. With `cls` "keep" the first feature is CLS, where the tower has one.
    """

    first = 1
    """Tokens before the patches."""

    masked = True
    """Whether layers take a mask."""

    def __init__(self, tower: Any, layer: int, cls: Cls, normed: bool) -> None:
        super().__init__()
        self.tower = tower
        total = len(self.blocks)
        self.depth = total + 1 + layer if layer < 0 else layer
        if not 0 <= self.depth <= total:
            raise ValueError(f"encoder.layer={layer}: the tower has {total} layers; take one of {-total - 1} to -1")
        if cls == "keep" and not self.first:
            raise ValueError(f"encoder.cls='keep': {type(tower).__name__} has no CLS token; take 'drop'")
        self.skip = self.first if cls == "drop" else 0
        self.normed = normed

    @property
    def blocks(self) -> Any:
        return self.tower.encoder.layers

    @property
    def norm(self) -> nn.Module:
        return self.tower.post_layernorm

    def embed(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        return self.tower.embeddings(
            pixels, interpolate_pos_encoding=True
        )  # which leaves them where the size is the same

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N P D"]:
        return self._read(self.embed(pixels), None)

    def _read(self, x: Tensor, mask: Tensor | None) -> Tensor:
        options = {"attention_mask": mask} if self.masked else {}
        for block in self.blocks[: self.depth]:
            x = block(x, **options)
        if self.normed:
            x = self.norm(x)
        return x[:, self.skip :]

    def slices(self, patches: Float[Tensor, "N P C"], grids: Sequence[Grid]) -> Float[Tensor, "N P D"]:
        """Features of slices of several shapes, each filled up to the longest; what fills is seen by nobody.

        `grids` are each slice's rows and columns; positions are stretched to them. Raises ValueError where the class takes no
        mask.
        """
        convolution, positions = self.patching()
        x = nn.functional.linear(patches, convolution.weight.flatten(1), convolution.bias)
        longest = patches.shape[1]
        shapes = list(dict.fromkeys(grids))
        each = [interpolated_positions(positions[self.first :], grid) for grid in shapes]
        places = torch.stack([nn.functional.pad(place, (0, 0, 0, longest - len(place))) for place in each])
        which = torch.tensor([shapes.index(grid) for grid in grids], device=x.device)
        x = self.begin(x + places.to(x.dtype)[which], positions[: self.first])
        seen = torch.tensor([rows * cols for rows, cols in grids], device=x.device) + self.first
        mask = torch.arange(x.shape[1], device=x.device) < seen[:, None]
        return self._read(x, mask[:, None, None])

    def patching(self) -> tuple[nn.Conv2d, Float[Tensor, "P D"]]:
        """What makes a patch a token, and the table of positions, those before the patches first."""
        raise ValueError(
            f"{type(self.tower).__name__} reads whole tiles, no slices of several shapes; take CLIP or SigLIP"
        )

    def begin(self, x: Float[Tensor, "N P D"], first: Float[Tensor, "F D"]) -> Float[Tensor, "N L D"]:  # noqa: ARG002 -- no CLS
        """Patches with what stands before them."""
        return x

    def unused(self) -> list[nn.Module]:
        """Modules above the layer that is read: kept for export, never run, never trained."""
        return [*self.blocks[self.depth :], *([] if self.normed else [self.norm])]

    def units(self) -> list[nn.Module]:
        return list(self.blocks[: self.depth])

    def branches(self) -> list[tuple[nn.Module, nn.Module]]:
        """Of each layer that is run the two modules whose output is added."""
        return [branches_of(block) for block in self.blocks[: self.depth]]


class ClipTower(ViTTower):
    """CLIP's: normed before the first layer."""

    def embed(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        return self.tower.pre_layrnorm(super().embed(pixels))

    def patching(self) -> tuple[nn.Conv2d, Float[Tensor, "P D"]]:
        return self.tower.embeddings.patch_embedding, self.tower.embeddings.position_embedding.weight

    def begin(self, x: Float[Tensor, "N P D"], first: Float[Tensor, "F D"]) -> Float[Tensor, "N L D"]:
        cls = (self.tower.embeddings.class_embedding + first).to(x.dtype)
        return self.tower.pre_layrnorm(torch.cat([cls.expand(len(x), 1, -1), x], dim=1))


class SiglipTower(ViTTower):
    """SigLIP's: no CLS among its positions."""

    first = 0

    def patching(self) -> tuple[nn.Conv2d, Float[Tensor, "P D"]]:
        return self.tower.embeddings.patch_embedding, self.tower.embeddings.position_embedding.weight


class EvaTower(ViTTower):
    """EVA-CLIP's: its layers take no mask, and norm a branch before it is added where they are `post_norm`."""

    masked = False
    post_norm = False

    def branches(self) -> list[tuple[nn.Module, nn.Module]]:
        if not self.post_norm:
            return super().branches()
        return [(block.layer_norm1, block.layer_norm2) for block in self.blocks[: self.depth]]


class DinoTower(ViTTower):
    """DINOv2's names for the same things."""

    @property
    def blocks(self) -> Any:
        return self.tower.encoder.layer

    @property
    def norm(self) -> nn.Module:
        return self.tower.layernorm

    def embed(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        return self.tower.embeddings(pixels)


class InternTower(DinoTower):
    """InternViT's: named as DINOv2's, its layers take no mask."""

    masked = False


class PlainTower(ViTTower):
    """ViT's names for the same things."""

    @property
    def blocks(self) -> Any:
        return self.tower.layers

    @property
    def norm(self) -> nn.Module:
        return self.tower.layernorm
