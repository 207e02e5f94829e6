"""EVA-02: the vision transformer of EVA-CLIP's second generation, which transformers has not."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mllm.own import OwnTower
from mllm.towers import Cls, ViTTower, patches_of, toy
from ops.visual import interpolated_positions, side_of
from pipelines.types import spec

EPS = 1e-6


@spec
class Eva02:
    """EVA-02 (arXiv:2303.11331, 2.1) as EVA-CLIP L/14 has it: SwiGLU, norms within each branch, rotary and learned places.

    Rotary places are of rows and columns and are stretched to the grid that it was trained with first, `grid` a side, whatever
    the picture's size (EVA-CLIP's `intp_freq`); learned ones are stretched as any tower's. Queries and values have biases.
    """

    kind: Literal["eva02"] = "eva02"
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    patch: int = 14
    image: int = 336
    grid: int = 16

    @property
    def width(self) -> int:
        return self.hidden_size

    def tokens(self, tile: int, interpolate: bool = False) -> int:
        """Patches of a tile. Raises ValueError, see `patches_of`."""
        return patches_of(self, tile, interpolate)

    def tiny(self) -> Self:
        return toy(self, grid=4)

    def config(self) -> Any:
        """Itself: there is no other configuration."""
        return self

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        model = Eva02Model(self)
        if weights is not None:
            model.read(weights)
        return Eva02Tower(model, layer, cls, normed)


class Eva02Model(OwnTower):
    """Embeddings, layers and the last norm."""

    def __init__(self, arch: Eva02) -> None:
        super().__init__()
        width, places = arch.hidden_size, (arch.image // arch.patch) ** 2
        self.patches = nn.Conv2d(3, width, arch.patch, arch.patch)
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.places = nn.Parameter(torch.randn(places + 1, width) * 0.02)
        self.layers = nn.ModuleList(Eva02Layer(arch) for _ in range(arch.layers))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def embed(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        """CLS, then the patches row by row, with their learned places."""
        grid = self.patches(pixels)
        places = interpolated_positions(self.places[1:], (grid.shape[2], grid.shape[3]))
        x = grid.flatten(2).transpose(1, 2) + places.to(grid.dtype)
        first = (self.cls + self.places[0]).to(x.dtype)
        return torch.cat([first.expand(len(x), 1, -1), x], dim=1)


class Eva02Layer(nn.Module):
    """Attention and a gated feed-forward; each branch is normed before it and before its last matrix."""

    def __init__(self, arch: Eva02) -> None:
        super().__init__()
        width, inner = arch.hidden_size, arch.intermediate_size
        self.heads, self.grid = arch.heads, arch.grid
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.inner_norm = nn.LayerNorm(width, eps=EPS)
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width, eps=EPS)
        self.gate = nn.Linear(width, inner)
        self.up = nn.Linear(width, inner)
        self.inner_feed_norm = nn.LayerNorm(inner, eps=EPS)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        y = self.norm(x)
        q, k, v = (
            part(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        turn = axial(side_of(x.shape[1] - 1), self.grid, q.shape[-1], x.device)
        found = F.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v)
        x = x + self.out(self.inner_norm(found.transpose(1, 2).flatten(2)))
        y = self.feed_norm(x)
        return x + self.down(self.inner_feed_norm(F.silu(self.gate(y)) * self.up(y)))


class Eva02Tower(ViTTower):
    """EVA-02's names for the same things; its layers take no mask."""

    masked = False

    @property
    def blocks(self) -> Any:
        return self.tower.layers

    @property
    def norm(self) -> nn.Module:
        return self.tower.norm

    def embed(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        return self.tower.embed(pixels)


def axial(
    side: int, grid: int, head: int, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "P E"], Float[Tensor, "P E"]]:
    """Cosine and sine of the angles of each patch of `side` x `side`, for heads of `head` channels, float32.

    The first half of the channels turns by the row, the other by the column, each as if there were `grid` of them; neighbouring
    channels turn together, by the place times 10,000 ** -(2 i / half).
    """
    half = head // 2
    rates = 10_000.0 ** -(torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
    places = torch.arange(side, device=device, dtype=torch.float32) / side * grid
    angles = (places[:, None] * rates).repeat_interleave(2, dim=1)
    rows, cols = angles[:, None].expand(side, side, half), angles[None].expand(side, side, half)
    whole = torch.cat([rows, cols], dim=2).flatten(0, 1)
    return whole.cos(), whole.sin()


def _turned(x: Float[Tensor, "N H L E"], turn: tuple[Tensor, Tensor]) -> Float[Tensor, "N H L E"]:
    """`x` with all but CLS turned."""
    first, rest = x.split([1, x.shape[2] - 1], dim=2)
    cos, sin = (y.to(x.dtype) for y in turn)
    pairs = rest.unflatten(3, (-1, 2))
    across = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(3)
    return torch.cat([first, rest * cos + across * sin], dim=2)
