"""Visual encoders: tiles -> patch features, through `transformers` towers.

An `Encoder` says which tower (`arch`, its shape, known without a download), whose weights, and which layer is read. To add a
tower: an architecture with `tokens`, `width` and `build`, its name in `VisionArch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from mllm.weights import load
from ops.images import normalize
from pipelines.types import spec

Folder = Callable[[str], str]
"""From a name of weights to the folder or hub id that the site keeps them under."""


@spec
class ClipVision:
    """CLIP's vision transformer (arXiv:2103.00020): `patch` pixels a side, learned positions, a CLS token that is dropped."""

    kind: Literal["clip_vision"] = "clip_vision"
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    patch: int
    image: int
    activation: str = "quick_gelu"

    @property
    def width(self) -> int:
        return self.hidden_size

    def tokens(self, tile: int) -> int:
        """Patches of a tile `tile` pixels a side. Raises ValueError when the tower was not made for that size."""
        if tile != self.image:
            raise ValueError(
                f"tiling cuts tiles of {tile} pixels and the encoder takes {self.image}; set the tiling's size to {self.image}"
            )
        return (tile // self.patch) ** 2

    def config(self) -> Any:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            patch_size=self.patch,
            image_size=self.image,
            hidden_act=self.activation,
        )

    def build(self, weights: str | None, layer: int) -> ClipTower:
        from transformers import CLIPVisionModel

        if weights is None:
            return ClipTower(CLIPVisionModel._from_config(self.config(), attn_implementation="sdpa"), layer)
        tower = load(CLIPVisionModel, "AutoModel", weights, attn_implementation="sdpa", dtype=torch.float32)
        _agree(weights, self.config(), tower.config, ("hidden_size", "num_hidden_layers", "patch_size", "image_size"))
        return ClipTower(tower, layer)


class ClipTower(nn.Module):
    """Runs only the layers below the one that is read."""

    def __init__(self, tower: Any, layer: int) -> None:
        super().__init__()
        self.tower = tower
        total = len(tower.encoder.layers)
        self.depth = total + 1 + layer if layer < 0 else layer
        if not 0 <= self.depth <= total:
            raise ValueError(f"encoder.layer={layer}: the tower has {total} layers; take one of {-total - 1} to -1")

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N P D"]:
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        for layer in self.tower.encoder.layers[: self.depth]:
            x = layer(x, attention_mask=None)
        return x[:, 1:]

    def unused(self) -> list[nn.Module]:
        """Modules above the layer that is read: kept for export, never run, never trained."""
        return [*self.tower.encoder.layers[self.depth :], self.tower.post_layernorm]

    def units(self) -> list[nn.Module]:
        return list(self.tower.encoder.layers[: self.depth])


@spec
class MobileNetV2:
    """MobileNetV2 (arXiv:1801.04381) up to its last convolution: one token for each 32 x 32 pixels, 1280 wide."""

    kind: Literal["mobilenet_v2"] = "mobilenet_v2"

    @property
    def width(self) -> int:
        return 1280

    def tokens(self, tile: int) -> int:
        """Cells of the final grid. Raises ValueError when the tile is no multiple of 32."""
        if tile % 32:
            raise ValueError(f"tiling cuts tiles of {tile} pixels; MobileNetV2 takes multiples of 32")
        return (tile // 32) ** 2

    def build(self, weights: str | None, layer: int) -> MobileNetTower:
        from transformers import MobileNetV2Config
        from transformers import MobileNetV2Model as Tower

        if layer != -1:
            raise ValueError(f"encoder.layer={layer}: MobileNetV2 is read at its last layer, -1")
        if weights is None:
            return MobileNetTower(Tower(MobileNetV2Config()))
        return MobileNetTower(load(Tower, "AutoModel", weights, dtype=torch.float32))


class MobileNetTower(nn.Module):
    """A convolutional tower; always in inference mode, since batch statistics would tie a tile to its neighbours."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower.eval()

    def train(self, mode: bool = True) -> MobileNetTower:  # noqa: ARG002 -- see the class
        return super().train(False)

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N P D"]:
        return self.tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)

    def unused(self) -> list[nn.Module]:
        return []

    def units(self) -> list[nn.Module]:
        return []


VisionArch = Annotated[ClipVision | MobileNetV2, Field(discriminator="kind")]


@spec
class Encoder:
    """A tower and how it is read. `weights` None trains it from scratch; `layer` counts as in LLaVA: -2 is the last but one.

    `mean` and `std` normalise RGB in [0, 1].
    """

    arch: VisionArch
    weights: str | None = None
    layer: int = -2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def build(self, folder: Folder) -> VisionEncoder:
        return VisionEncoder(self, self.arch.build(folder(self.weights) if self.weights else None, self.layer))


class VisionEncoder(nn.Module):
    """uint8 tiles -> features: normalises on the tiles' own device, then runs the tower."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: Encoder, tower: ClipTower | MobileNetTower) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    def forward(self, tiles: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N P D"]:
        """Patch features in row-major order, without CLS."""
        dtype = next(self.tower.parameters()).dtype
        pixels = normalize(tiles, self.mean, self.std).to(dtype)
        if any(p.requires_grad for p in self.tower.parameters()):
            return self.tower(pixels)
        with torch.no_grad():  # a frozen tower keeps no activations
            return self.tower(pixels)


def _agree(weights: str, expected: Any, found: Any, fields: tuple[str, ...]) -> None:
    """Raise ValueError when downloaded weights are not of the shape that the recipe plans with."""
    for field in fields:
        wanted, has = getattr(expected, field), getattr(found, field)
        if wanted != has:
            raise ValueError(
                f"weights {weights!r} have {field}={has} and the recipe's arch says {wanted}; mend the arch"
            )
