"""Connectors: patch features of width `d_in` -> visual tokens of the language model's width `d_out`.

To add one: a spec with `tokens` and `build`, its module, and its name in `Connector`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from pipelines.types import spec


@spec
class Linear:
    """One matrix (LLaVA, arXiv:2304.08485)."""

    kind: Literal["linear"] = "linear"

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes."""
        return patches

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return nn.Linear(d_in, d_out)


@spec
class MLP:
    """`depth` matrices with GELU between (LLaVA-1.5's `mlp2x_gelu`, arXiv:2310.03744)."""

    kind: Literal["mlp"] = "mlp"
    depth: int = 2

    def tokens(self, patches: int) -> int:
        """Visual tokens that a tile of `patches` patches becomes."""
        return patches

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Stack([d_in, *[d_out] * self.depth])


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


Connector = Annotated[Linear | MLP, Field(discriminator="kind")]
