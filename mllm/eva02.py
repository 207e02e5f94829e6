"""EVA-02's vision transformer (arXiv:2303.11331), which EVA-CLIP begins from: rotary positions, SwiGLU, norms inside branches."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from mllm.own import OwnTower
from mllm.towers import Cls, ViTShape, ViTTower
from ops.visual import interpolated_positions
from pipelines.types import spec

EPS = 1e-6


@spec
class Eva02(ViTShape):
    """EVA-02 (arXiv:2303.11331, 2.1): a ViT with learned and rotary positions, SwiGLU, and LayerNorm within both branches.

    `grid` patches a side are what its rotary positions count on, however many a picture has. `weights` is a folder with a
    `model.safetensors`, under EVA's own names or under ours; what it has beside the tower is left.
    """

    kind: Literal["eva02"] = "eva02"
    intermediate_size: int
    patch: int = 14
    image: int = 224
    grid: int = 16

    def config(self) -> Any:
        raise ValueError("transformers has no EVA-02; its shape is the spec's own")

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        net = EvaNet(self)
        if weights is not None:
            _begin(net, weights)
        return Eva02Tower(net, layer, cls, normed)


def rotary_angles(side: int, width: int, trained: int) -> Float[Tensor, "P width"]:
    """Angles of the channels of a head `width` wide: half of them turn with a patch's row, half with its column, in pairs.

    Places are counted as if a picture had `trained` patches a side (EVA-02's `VisionRotaryEmbedding`; RoPE, arXiv:2104.09864).
    """
    half = width // 2
    speeds = 10_000.0 ** -(torch.arange(0, half, 2) / half)
    places = torch.arange(side) / side * trained
    each = torch.outer(places, speeds).repeat_interleave(2, dim=1)
    rows, columns = each[:, None].expand(-1, side, -1), each[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def turned(x: Float[Tensor, "*N P width"], angles: Float[Tensor, "P width"]) -> Float[Tensor, "*N P width"]:
    """Each pair of neighbouring channels turned by its angle."""
    across = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * angles.cos().to(x) + across * angles.sin().to(x)


class EvaAttention(nn.Module):
    """Attention in which patches are turned and CLS is not; keys have no bias."""

    def __init__(self, spec: Eva02) -> None:
        super().__init__()
        width = spec.hidden_size
        self.heads = spec.heads
        self.grid = spec.grid
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        angles = rotary_angles(math.isqrt(x.shape[1] - 1), q.shape[-1], self.grid).to(x.device)
        q, k = (torch.cat([part[:, :, :1], turned(part[:, :, 1:], angles)], dim=2) for part in (q, k))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.norm(seen))


class EvaFeedForward(nn.Module):
    """SwiGLU with a norm before its last matrix."""

    def __init__(self, spec: Eva02) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.up = nn.Linear(spec.hidden_size, spec.intermediate_size)
        self.norm = nn.LayerNorm(spec.intermediate_size, eps=EPS)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class EvaLayer(nn.Module):
    """Attention, then the feed-forward, each behind a norm."""

    def __init__(self, spec: Eva02) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(spec.hidden_size, eps=EPS)
        self.attention = EvaAttention(spec)
        self.mlp_norm = nn.LayerNorm(spec.hidden_size, eps=EPS)
        self.mlp = EvaFeedForward(spec)

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class EvaNet(OwnTower):
    """The transformer's weights: patches, CLS and positions, layers, the norm behind them."""

    def __init__(self, spec: Eva02) -> None:
        super().__init__()
        width = spec.hidden_size
        self.patches = nn.Conv2d(3, width, spec.patch, stride=spec.patch)
        self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(1 + (spec.image // spec.patch) ** 2, width))
        self.layers = nn.ModuleList(EvaLayer(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(width, eps=EPS)
        with torch.no_grad():
            for vector in (self.cls, self.positions):
                nn.init.trunc_normal_(vector, std=0.02)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def embed(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        x = self.patches(pixels)
        places = interpolated_positions(self.positions[1:], (x.shape[2], x.shape[3])).to(x.dtype)
        x = x.flatten(2).transpose(1, 2) + places
        return torch.cat([(self.cls + self.positions[0]).expand(len(x), 1, -1), x], dim=1)


class Eva02Tower(ViTTower):
    """EVA-02 read as other towers are."""

    masked = False

    @property
    def blocks(self) -> Any:
        return self.tower.layers

    @property
    def norm(self) -> nn.Module:
        return self.tower.norm

    def embed(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        return self.tower.embed(pixels)


NAMES = (
    (r"patch_embed\.proj\.", "patches."),
    (r"cls_token$", "cls"),
    (r"pos_embed$", "positions"),
    (r"blocks\.", "layers."),
    (r"\.norm1\.", ".attention_norm."),
    (r"\.norm2\.", ".mlp_norm."),
    (r"\.attn\.(q|v)_bias$", r".attention.\1_proj.bias"),
    (r"\.attn\.", ".attention."),
    (r"\.inner_attn_ln\.", ".norm."),
    (r"\.ffn_ln\.", ".norm."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.attention\.proj\.", ".attention.out."),
    (r"\.w1\.", ".gate."),
    (r"\.w2\.", ".up."),
    (r"\.w3\.", ".down."),
)
"""EVA's own names of weights (baaivision/EVA), from left to right, and ours."""


def our_name(name: str) -> str:
    """What we call the weight that EVA calls `name`, with or without `visual.` before it."""
    name = name.removeprefix("visual.")
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _begin(net: EvaNet, folder: str) -> None:
    """Read the weights in `folder`. Raises ValueError, naming one, where some are missing or of another shape."""
    found = {our_name(name): value for name, value in load_file(Path(folder) / "model.safetensors").items()}
    for name, parameter in net.named_parameters():
        value = found.get(name)
        if value is None or value.numel() != parameter.numel():
            has = "nothing" if value is None else f"{tuple(value.shape)}"
            raise ValueError(
                f"weights {folder!r} have {has} for {name}, and the recipe's arch says {tuple(parameter.shape)}; mend the arch"
            )
        with torch.no_grad():
            parameter.copy_(value.reshape(parameter.shape))
