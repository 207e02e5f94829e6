"""NFNet: a convolutional tower without norms, whose weights are standardised, which transformers has not."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mllm.convnets import ConvTower, cells_of, read_last
from mllm.own import OwnTower
from mllm.towers import Cls
from pipelines.types import spec

GAIN = 1.7015043497085571
"""What GELU is multiplied by, so that the variance of what goes through it stays one."""

ALPHA = 0.2
"""How much a branch counts beside what passes by."""


@spec
class NFNet:
    """NFNet (arXiv:2102.06171, 3 and app.): one token for each 32 x 32 pixels, as wide as the last stage, as Flamingo reads it.

    `depths` and `widths` are the stages'; groups of convolutions are `group` channels wide. Its last convolution, which widens
    what is averaged for classes, is left away, and layers are not dropped at random.
    """

    kind: Literal["nfnet"] = "nfnet"
    depths: tuple[int, ...] = (7, 14, 42, 21)
    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    stem: int = 16
    group: int = 128

    @property
    def width(self) -> int:
        return self.widths[-1]

    def tokens(self, tile: int, interpolate: bool = False) -> int:  # noqa: ARG002 -- any size that 32 divides
        """Cells of the final grid. Raises ValueError when the tile is no multiple of 32."""
        return cells_of("NFNet", tile)

    def tiny(self) -> Self:
        return replace(self, depths=(1, 2, 1, 1), widths=(16, 16, 32, 32), stem=4, group=8)

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> NFTower:
        read_last("NFNet", layer, cls, normed)
        model = NFModel(self)
        if weights is not None:
            model.read(weights)
        return NFTower(model)


class NFTower(ConvTower):
    """NFNet's cells, row by row."""

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N P D"]:
        return self.tower(pixels).flatten(2).transpose(1, 2).contiguous()

    def units(self) -> list[nn.Module]:
        return list(self.tower.stages)


class NFModel(OwnTower):
    """Stem and stages."""

    def __init__(self, arch: NFNet) -> None:
        super().__init__()
        stem = [3, *(arch.stem * 2**n for n in range(4))]
        strides = (2, 1, 1, 2)
        self.stem = nn.ModuleList(
            StandardConv(a, b, 3, stride) for a, b, stride in zip(stem[:-1], stem[1:], strides, strict=True)
        )
        self.stages = nn.ModuleList()
        before, variance = stem[-1], 1.0
        for number, (depth, width) in enumerate(zip(arch.depths, arch.widths, strict=True)):
            blocks = []
            for place in range(depth):
                stride = 2 if number and not place else 1
                blocks.append(NFBlock(before, width, stride, variance**-0.5, arch.group))
                before, variance = width, (1.0 if not place else variance) + ALPHA**2
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N D h w"]:
        x = pixels
        for number, convolution in enumerate(self.stem):
            x = convolution(x if not number else _gelu(x))
        for stage in self.stages:
            x = stage(x)
        return x


class StandardConv(nn.Module):
    """A convolution whose weights have mean 0 and variance 1 / fan-in for each output, times a learned gain (3.1)."""

    def __init__(self, before: int, after: int, side: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(after, before // groups, side, side))
        self.gain = nn.Parameter(torch.ones(after, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(after))
        self.stride, self.padding, self.groups = stride, side // 2, groups
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        fan_in = self.weight[0].numel()
        weight = (self.weight - mean) * (variance * fan_in + 1e-4).rsqrt() * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class NFBlock(nn.Module):
    """A bottleneck of two grouped convolutions with squeeze and excitation; it enters times a gain that begins at zero.

    What comes in is divided by its expected deviation: `scale`.
    """

    def __init__(self, before: int, after: int, stride: int, scale: float, group: int) -> None:
        super().__init__()
        groups = after // 2 // group
        middle = groups * group
        self.scale = scale
        self.stride = stride
        self.shortcut = StandardConv(before, after, 1) if before != after or stride > 1 else None
        self.down = StandardConv(before, middle, 1)
        self.first = StandardConv(middle, middle, 3, stride, groups)
        self.second = StandardConv(middle, middle, 3, 1, groups)
        self.up = StandardConv(middle, after, 1)
        self.squeeze = nn.Linear(after, after // 2)
        self.excite = nn.Linear(after // 2, after)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        y = _gelu(x) * self.scale
        if self.shortcut is not None:
            small = F.avg_pool2d(y, 2, 2, ceil_mode=True, count_include_pad=False) if self.stride > 1 else y
            x = self.shortcut(small)
        y = self.first(_gelu(self.down(y)))
        y = self.up(_gelu(self.second(_gelu(y))))
        weight = self.excite(F.relu(self.squeeze(y.mean((2, 3))))).sigmoid()
        return x + ALPHA * self.gain * 2 * weight[:, :, None, None] * y


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x) * GAIN
