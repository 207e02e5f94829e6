"""Convolutional networks that `transformers` has not: LeNet-5, AlexNet, VGG. Pixels (N, 3, H, W) -> class scores (N, C)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LUMA = (0.299, 0.587, 0.114)


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al., Gradient-based learning applied to document recognition, 1998): 32 x 32 grey pixels.

    Its second convolution sees all six maps, where the paper leaves some out, and scores come from a matrix, where the paper has
    distances to drawn digits.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)])
        self.layers = nn.ModuleList([nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, classes)])

    def forward(self, pixels: Float[Tensor, "N 3 32 32"]) -> Float[Tensor, "N C"]:
        x = (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        for convolution in self.convolutions:
            x = F.avg_pool2d(torch.tanh(convolution(x)), 2)
        return _scores(self.layers, x, torch.tanh)


class AlexNet(nn.Module):
    """AlexNet (Krizhevsky et al., ImageNet classification with deep convolutional neural networks, 2012): 227 x 227 pixels.

    Five convolutions, three of them in two groups, local response normalisation after the first two. No dropout: what a picture
    gives here does not depend on chance.
    """

    def __init__(self, classes: int, width: int = 96) -> None:
        super().__init__()
        big, middle, hidden = width * 8 // 3, width * 4, width * 128 // 3
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(3, width, 11, stride=4),
                nn.Conv2d(width, big, 5, padding=2, groups=2),
                nn.Conv2d(big, middle, 3, padding=1),
                nn.Conv2d(middle, middle, 3, padding=1, groups=2),
                nn.Conv2d(middle, big, 3, padding=1, groups=2),
            ]
        )
        self.layers = nn.ModuleList(
            [nn.Linear(big * 36, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, classes)]
        )

    def forward(self, pixels: Float[Tensor, "N 3 227 227"]) -> Float[Tensor, "N C"]:
        x = pixels
        for number, convolution in enumerate(self.convolutions):
            x = F.relu(convolution(x))
            if number < 2:
                x = F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=2.0)
            if number in (0, 1, 4):
                x = F.max_pool2d(x, 3, 2)
        return _scores(self.layers, x, F.relu)


class VGG(nn.Module):
    """VGG (arXiv:1409.1556, table 1): 3 x 3 convolutions in five blocks of `depths`, three layers behind. No dropout, as above.

    `width` of the first block, 64; it doubles up to eight times. `grid` is the side of what comes out of the last block.
    """

    def __init__(self, classes: int, depths: tuple[int, ...], width: int = 64, grid: int = 7) -> None:
        super().__init__()
        self.ends: set[int] = set()
        self.convolutions = nn.ModuleList()
        before = 3
        for block, depth in enumerate(depths):
            after = width * min(2**block, 8)
            for _ in range(depth):
                self.convolutions.append(nn.Conv2d(before, after, 3, padding=1))
                before = after
            self.ends.add(len(self.convolutions) - 1)
        hidden = 64 * width
        self.layers = nn.ModuleList(
            [nn.Linear(before * grid**2, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, classes)]
        )

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N C"]:
        x = pixels
        for number, convolution in enumerate(self.convolutions):
            x = F.relu(convolution(x))
            if number in self.ends:
                x = F.max_pool2d(x, 2)
        return _scores(self.layers, x, F.relu)


def _scores(layers: nn.ModuleList, grid: Tensor, activation: object) -> Tensor:
    assert callable(activation)
    x = grid.flatten(1)
    *hidden, last = layers
    for layer in hidden:
        x = activation(layer(x))
    return last(x)


def group_norms(module: nn.Module, groups: int = 32) -> None:
    """Put group normalisation (arXiv:1803.08494) in the place of all batch normalisation of `module`, with as many weights."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                count = child.num_features
                setattr(parent, name, nn.GroupNorm(groups if count % groups == 0 else 1, count, eps=child.eps))


NormKind = Literal["group", "batch"]
