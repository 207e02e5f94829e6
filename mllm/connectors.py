"""Connectors: patch features of width `d_in` -> visual tokens of the language model's width `d_out`.

Here are those that keep the grid or make it coarser; `mllm.resamplers` has those that ask it with learned queries,
`mllm.mining` those that look at several towers. To add one: a spec with `tokens`, `build` and `tiny`, its module, and its name
in `Connector`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mllm.instructed import InstructedQFormer
from mllm.mining import SVA, PatchMining
from mllm.pooled import FirstFeature
from mllm.qllama import QLLaMA
from mllm.resamplers import Abstractor, CrossPool, Perceiver, QFormer
from ops.visual import pooled, side_of, space_to_depth
from pipelines.types import spec

__all__ = [
    "MLP",
    "SVA",
    "Abstractor",
    "Branches",
    "Connector",
    "ConvGLU",
    "CrossPool",
    "FirstFeature",
    "InstructedQFormer",
    "Linear",
    "PatchMining",
    "Perceiver",
    "PixelShuffle",
    "Pool",
    "QFormer",
    "QLLaMA",
    "Transformer",
    "bare",
    "read_weights",
]


@spec
class Linear:
    """One matrix (LLaVA, arXiv:2304.08485)."""

    kind: Literal["linear"] = "linear"

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes."""
        return patches

    def tiny(self) -> Self:
        return self

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Matrix(d_in, d_out)


@spec
class MLP:
    """`depth` matrices with GELU between (LLaVA-1.5's `mlp2x_gelu`, arXiv:2310.03744)."""

    kind: Literal["mlp"] = "mlp"
    depth: int = 2

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes."""
        return patches

    def tiny(self) -> Self:
        return self

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Stack([d_in, *[d_out] * self.depth])


@spec
class PixelShuffle:
    """Squares of `factor` x `factor` features as one, wider, then an MLP of `depth` matrices, with a LayerNorm first.

    InternVL's `pixel_shuffle` and `mlp1` (arXiv:2404.16821, 3.1) and VILA-1.5's `mlp_downsample` are the same thing; VILA's own
    ablation (arXiv:2312.07533, 3.3) has `depth` 1 and no `norm`. An odd grid is filled up with zeros.
    """

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = 2
    depth: int = 2
    norm: bool = True

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes. Raises ValueError when they are no square."""
        return (-(-side_of(patches) // self.factor)) ** 2

    def tiny(self) -> Self:
        return self

    def build(self, d_in: int, d_out: int) -> nn.Module:
        wide = d_in * self.factor**2
        return Shuffled(self.factor, nn.LayerNorm(wide) if self.norm else None, Stack([wide, *[d_out] * self.depth]))


@spec
class Pool:
    """Means of squares of `stride` x `stride` features, after an MLP of `depth` matrices or before it.

    LLaVA-NeXT-Video pools `before`, as transformers' class of its released weights does; later models of the same code pool what
    they have projected (`get_2dPool`, LLaVA-NeXT `llava_arch.py`).
    """

    kind: Literal["pool"] = "pool"
    stride: int = 2
    depth: int = 2
    before: bool = False

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes. Raises ValueError when they are no square."""
        return (side_of(patches) // self.stride) ** 2

    def tiny(self) -> Self:
        return self

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Pooled(self.stride, self.before, Stack([d_in, *[d_out] * self.depth]))


@spec
class ConvGLU:
    """CogVLM (arXiv:2311.03079, 2.1) and CogVLM2 (arXiv:2408.16500): a linear layer, LayerNorm, GELU, SwiGLU without biases.

    `stride` 2 has a 2 x 2 convolution before it that quarters the features (CogVLM2, GLM-4V); 1 has none. `widens` lets it
    bring them to the language model's width (GLM-4V). With `marks` each tile stands between two learned tokens. What comes
    out is divided by `divisor` (GLM-4V's `scaling_factor`). `intermediate_size` is the language model's own.
    """

    kind: Literal["conv_glu"] = "conv_glu"
    stride: int = 2
    intermediate_size: int = 14_336
    marks: bool = True
    widens: bool = False
    divisor: Annotated[float, Field(gt=0)] = 1.0

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes, marks among them."""
        return (side_of(patches) // self.stride) ** 2 + 2 * self.marks

    def tiny(self) -> Self:
        return replace(self, intermediate_size=64)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return GatedProjector(self, d_in, d_out)


@spec
class Transformer:
    """Layers of self-attention over a tile's features, then one matrix (VILA's ablation, arXiv:2312.07533, 3.1).

    The paper gives no sizes: as wide as the features, `layers` layers with a fourfold feed-forward.
    """

    kind: Literal["transformer"] = "transformer"
    layers: int = 2
    heads: int = 16

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes."""
        return patches

    def tiny(self) -> Self:
        return replace(self, layers=1, heads=4)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return TransformerProjector(self, d_in, d_out)


Part = Annotated[
    Linear | MLP | PixelShuffle | Pool | ConvGLU | Transformer | QFormer | Perceiver | CrossPool | Abstractor,
    Field(discriminator="kind"),
]
"""A connector of one tower's features."""


@spec
class Branches:
    """Several connectors on the same features, their tokens one after the other.

    BLIVA (arXiv:2308.09936, 3.2): a Q-Former's 32 tokens, then all 257 features through a matrix.
    """

    kind: Literal["branches"] = "branches"
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if any(isinstance(part, Perceiver) and part.frames for part in self.parts):
            raise ValueError(
                "branches read tile by tile, and a perceiver of `frames` reads a video's together; set its frames to 0, or take "
                "it by itself"
            )

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes."""
        return sum(part.tokens(patches) for part in self.parts)

    def tiny(self) -> Self:
        return replace(self, parts=tuple(part.tiny() for part in self.parts))

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Beside([part.build(d_in, d_out) for part in self.parts])


def read_weights(spec: Connector, module: nn.Module, folder: Callable[[str], str]) -> None:
    """Give `module` the weights that its spec names, if it does; `folder` finds them."""
    parts = zip(spec.parts, module.parts, strict=True) if isinstance(spec, Branches) else [(spec, module)]  # type: ignore[arg-type]  # a ModuleList
    for part, built in parts:
        if isinstance(part, QFormer | InstructedQFormer | QLLaMA) and part.weights:
            built.read(folder(part.weights))  # type: ignore[operator]  # a Querying or a Middleware


def bare(spec: Connector) -> Connector:
    """The same without weights to be read."""
    if isinstance(spec, Branches):
        return replace(spec, parts=tuple(replace(p, weights=None) if isinstance(p, QFormer) else p for p in spec.parts))
    if isinstance(spec, InstructedQFormer):
        return spec.bare()
    return replace(spec, weights=None) if isinstance(spec, QFormer | QLLaMA) else spec


class Matrix(nn.Linear):
    """A linear layer whose output is no view of its product, on which FSDP2 must not hang its hooks."""

    def forward(self, input: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N P D"]:  # noqa: A002 -- torch's own name
        return super().forward(input).clone()


class Stack(nn.Module):
    """Linear layers of the given widths with GELU between."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N P D"]:
        first, *rest = self.layers
        x = first(features)
        for layer in rest:
            x = layer(nn.functional.gelu(x))
        return x.clone()  # a linear layer returns a view of its product, on which FSDP2 must not hang its hooks


class Shuffled(nn.Module):
    """`PixelShuffle`."""

    def __init__(self, factor: int, norm: nn.LayerNorm | None, mlp: Stack) -> None:
        super().__init__()
        self.factor = factor
        self.norm = norm
        self.mlp = mlp

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        x = space_to_depth(features, self.factor)
        return self.mlp(x if self.norm is None else self.norm(x))


class Pooled(nn.Module):
    """`Pool`."""

    def __init__(self, stride: int, before: bool, mlp: Stack) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.mlp = mlp

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        if self.before:
            return self.mlp(pooled(features, self.stride))
        return pooled(self.mlp(features), self.stride).clone()


class GatedProjector(nn.Module):
    """`ConvGLU`."""

    def __init__(self, spec: ConvGLU, d_in: int, d_out: int) -> None:
        super().__init__()
        between = d_out if spec.widens and spec.stride > 1 else d_in
        self.conv = nn.Conv2d(d_in, between, spec.stride, spec.stride) if spec.stride > 1 else None
        self.project = nn.Linear(between, d_out, bias=False)
        self.divisor = spec.divisor
        self.norm = nn.LayerNorm(d_out)
        self.gate = nn.Linear(d_out, spec.intermediate_size, bias=False)
        self.up = nn.Linear(d_out, spec.intermediate_size, bias=False)
        self.down = nn.Linear(spec.intermediate_size, d_out, bias=False)
        self.marks = nn.Parameter(torch.zeros(2, d_out)) if spec.marks else None

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        x = features
        if self.conv is not None:
            side = side_of(x.shape[1])
            x = self.conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        x = nn.functional.gelu(self.norm(self.project(x)))
        x = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        if self.marks is not None:
            first, last = self.marks.to(x.dtype).expand(len(x), 2, -1).split(1, dim=1)
            x = torch.cat([first, x, last], dim=1)
        return x.clone() if self.divisor == 1 else x / self.divisor


class TransformerProjector(nn.Module):
    """`Transformer`."""

    def __init__(self, spec: Transformer, d_in: int, d_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d_in, spec.heads, 4 * d_in, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(spec.layers)
        )
        self.project = nn.Linear(d_in, d_out)

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N P D"]:
        x = features
        for layer in self.layers:
            x = layer(x)
        return self.project(x).clone()


class Beside(nn.Module):
    """`Branches`."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        return torch.cat([part(features) for part in self.parts], dim=1)


Connector = Annotated[
    Linear
    | MLP
    | PixelShuffle
    | Pool
    | ConvGLU
    | Transformer
    | QFormer
    | Perceiver
    | CrossPool
    | Abstractor
    | QLLaMA
    | Branches
    | InstructedQFormer
    | FirstFeature
    | SVA
    | PatchMining,
    Field(discriminator="kind"),
]
