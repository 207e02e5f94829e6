"""Convolutional towers: shapes, and `transformers`' classes behind them. A tile becomes the cells of their last grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mllm.towers import Cls
from mllm.weights import agree, load
from pipelines.types import spec


def cells_of(name: str, tile: int) -> int:
    """Cells of 32 x 32 pixels. Raises ValueError, naming the tower, when the tile is no multiple of 32."""
    if tile % 32:
        raise ValueError(f"tiling cuts tiles of {tile} pixels; {name} takes multiples of 32")
    return (tile // 32) ** 2


def read_last(name: str, layer: int, cls: Cls, normed: bool) -> None:
    """Raise ValueError, naming the tower, unless its last grid is read as it is."""
    if layer != -1:
        raise ValueError(f"encoder.layer={layer}: {name} is read at its last layer, -1")
    if cls != "drop" or normed:
        raise ValueError(
            f"encoder.cls={cls!r}, encoder.normed={normed}: {name} has neither CLS nor a norm of its cells"
        )


@spec
class MobileNetV2:
    """MobileNetV2 (arXiv:1801.04381) up to its last convolution: one token for each 32 x 32 pixels, 1280 wide."""

    kind: Literal["mobilenet_v2"] = "mobilenet_v2"

    @property
    def width(self) -> int:
        return 1280

    def tokens(self, tile: int, interpolate: bool = False) -> int:  # noqa: ARG002 -- any size that 32 divides
        """Cells of the final grid. Raises ValueError when the tile is no multiple of 32."""
        return cells_of("MobileNetV2", tile)

    def tiny(self) -> Self:
        """Itself: it has 2 million parameters, and no smaller form here."""
        return self

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ConvTower:
        from transformers import MobileNetV2Config, MobileNetV2Model

        read_last("MobileNetV2", layer, cls, normed)
        if weights is None:
            return ConvTower(MobileNetV2Model(MobileNetV2Config()))
        return ConvTower(load(MobileNetV2Model, "AutoModel", weights, dtype=torch.float32))


@spec
class ResNet:
    """ResNet with bottlenecks (arXiv:1512.03385): one token for each 32 x 32 pixels, as wide as the last stage."""

    kind: Literal["resnet"] = "resnet"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    stem: int = 64

    @property
    def width(self) -> int:
        return self.hidden_sizes[-1]

    def tokens(self, tile: int, interpolate: bool = False) -> int:  # noqa: ARG002 -- any size that 32 divides
        """Cells of the final grid. Raises ValueError when the tile is no multiple of 32."""
        return cells_of("ResNet", tile)

    def tiny(self) -> Self:
        return replace(self, depths=(1, 1, 1, 1), hidden_sizes=(16, 16, 32, 32), stem=16)

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ConvTower:
        from transformers import ResNetConfig, ResNetModel

        read_last("ResNet", layer, cls, normed)
        config = ResNetConfig(embedding_size=self.stem, hidden_sizes=list(self.hidden_sizes), depths=list(self.depths))
        if weights is None:
            return ResidualTower(ResNetModel(config))
        tower = load(ResNetModel, "AutoModel", weights, dtype=torch.float32)
        agree(weights, config, tower.config, ("hidden_sizes", "depths"))
        return ResidualTower(tower)


@spec
class ResNeXt:
    """ResNeXt (arXiv:1611.05431): ResNet whose 3 x 3 convolutions are in `groups`, in the first stage `per_group` channels each.

    152 layers of 32 x 8d are those of Pixel-BERT's larger tower. `transformers` has no class of it: weights cannot be loaded.
    """

    kind: Literal["resnext"] = "resnext"
    depths: tuple[int, ...] = (3, 8, 36, 3)
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    stem: int = 64
    groups: int = 32
    per_group: int = 8

    @property
    def width(self) -> int:
        return self.hidden_sizes[-1]

    def tokens(self, tile: int, interpolate: bool = False) -> int:  # noqa: ARG002 -- any size that 32 divides
        """Cells of the final grid. Raises ValueError when the tile is no multiple of 32."""
        return cells_of("ResNeXt", tile)

    def tiny(self) -> Self:
        return replace(self, depths=(1, 1, 1, 1), hidden_sizes=(16, 16, 32, 32), stem=16, groups=2, per_group=4)

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ConvTower:
        from transformers import ResNetConfig, ResNetModel
        from transformers.models.resnet.modeling_resnet import ResNetConvLayer

        read_last("ResNeXt", layer, cls, normed)
        if weights is not None:
            raise ValueError(
                f"transformers has no ResNeXt to read weights={weights!r} with; leave them away, or take a ResNet"
            )
        layer_of: Any = ResNetConvLayer  # whose activation may be None, whatever its signature says
        tower: Any = ResNetModel(
            ResNetConfig(embedding_size=self.stem, hidden_sizes=list(self.hidden_sizes), depths=list(self.depths))
        )
        before = self.stem
        for number, (stage, after) in enumerate(zip(tower.encoder.stages, self.hidden_sizes, strict=True)):
            for place, block in enumerate(stage.layers):
                inner = self.groups * self.per_group * 2**number
                stride = 2 if number and not place else 1
                middle = ResNetConvLayer(inner, inner, stride=stride)
                middle.convolution = nn.Conv2d(inner, inner, 3, stride, 1, groups=self.groups, bias=False)
                block.layer = nn.Sequential(
                    ResNetConvLayer(before, inner, kernel_size=1),
                    middle,
                    layer_of(inner, after, 1, activation=None),
                )
                before = after
        for module in tower.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return ResidualTower(tower)


@spec
class ConvNeXt:
    """ConvNeXt (arXiv:2201.03545), also as OpenCLIP trains it: one token for each 32 x 32 pixels, as wide as the last stage.

    `grid` reads all stages instead: each resized to `grid` x `grid` cells, bilinear, and joined over channels (Mini-Gemini,
    arXiv:2403.18814, 3.1; Cambrian-1's multi-stage towers, arXiv:2406.16860, 3.2).
    """

    kind: Literal["convnext"] = "convnext"
    depths: tuple[int, ...] = (3, 3, 27, 3)
    hidden_sizes: tuple[int, ...] = (192, 384, 768, 1536)
    grid: int | None = None

    @property
    def width(self) -> int:
        return self.hidden_sizes[-1] if self.grid is None else sum(self.hidden_sizes)

    def tokens(self, tile: int, interpolate: bool = False) -> int:  # noqa: ARG002 -- any size that 32 divides
        """Cells of the grid. Raises ValueError when the tile is no multiple of 32."""
        cells = cells_of("ConvNeXt", tile)
        return cells if self.grid is None else self.grid**2

    def tiny(self) -> Self:
        return replace(self, depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 32), grid=None if self.grid is None else 8)

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ConvTower:
        from transformers import ConvNextConfig, ConvNextModel

        read_last("ConvNeXt", layer, cls, normed)
        config = ConvNextConfig(hidden_sizes=list(self.hidden_sizes), depths=list(self.depths))
        if weights is None:
            return ConvNextTower(ConvNextModel(config), self.grid)
        tower = load(ConvNextModel, "AutoModel", weights, dtype=torch.float32)
        agree(weights, config, tower.config, ("hidden_sizes", "depths"))
        return ConvNextTower(tower, self.grid)


class ConvTower(nn.Module):
    """A convolutional tower; always in inference mode, since batch statistics would tie a tile to its neighbours."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower.eval()

    def train(self, mode: bool = True) -> ConvTower:  # noqa: ARG002 -- see the class
        return super().train(False)

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N P D"]:
        return self.tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)

    def unused(self) -> list[nn.Module]:
        return []

    def units(self) -> list[nn.Module]:
        return []


class ResidualTower(ConvTower):
    """ResNet and its kin, whose blocks can be sharded one by one."""

    def units(self) -> list[nn.Module]:
        return [block for stage in self.tower.encoder.stages for block in stage.layers]


class ConvNextTower(ConvTower):
    """ConvNeXt, at its last stage or at all of them."""

    def __init__(self, tower: Any, grid: int | None) -> None:
        super().__init__(tower)
        self.grid = grid

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N P D"]:
        x = self.tower.embeddings(pixels)
        found = []
        for stage in self.tower.encoder.stages:
            x = stage(x)
            if self.grid is not None:
                found.append(F.interpolate(x.float(), size=(self.grid, self.grid), mode="bilinear").to(x.dtype))
        if self.grid is not None:
            x = torch.cat(found, dim=1)
        return x.flatten(2).transpose(1, 2).contiguous()

    def unused(self) -> list[nn.Module]:
        return [self.tower.layernorm]

    def units(self) -> list[nn.Module]:
        return list(self.tower.encoder.stages)
