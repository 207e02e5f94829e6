"""EVA-02's tower: positions that turn, and EVA's own weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mllm.encoders import Eva02
from mllm.eva02 import EvaNet, our_name, rotary_angles, turned

TINY = Eva02(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch=8, image=32, grid=4)


def test_two_patches_see_of_each_other_how_far_apart_they_are() -> None:
    """The product of a turned query and a turned key depends on rows and columns between them, and on nothing else."""
    angles = rotary_angles(6, 16, 6)
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 16).double()
    queries, keys = (turned(x.expand(36, -1), angles.double()) for x in (query, key))
    scores = (queries @ keys.T).view(6, 6, 6, 6)
    for rows, columns in ((1, 0), (0, 2), (2, 3)):
        moved = scores[: 6 - rows, : 6 - columns, rows:, columns:]
        near = torch.einsum("rcrc->rc", moved)
        torch.testing.assert_close(near, near[0, 0].expand_as(near), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])
    torch.testing.assert_close(queries.norm(dim=1), query.norm().expand(36))


def test_a_larger_picture_is_counted_in_the_same_places() -> None:
    small, large = rotary_angles(4, 16, 4).view(4, 4, 16), rotary_angles(8, 16, 4).view(8, 8, 16)
    torch.testing.assert_close(large[::2, ::2], small)


class Theirs(nn.Module):
    """EVA's own names of weights, as its repository has them."""

    patch_embed: Any
    blocks: Any

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 32, 8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.ModuleList(self._block() for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 24)

    def _block(self) -> nn.Module:
        block: Any
        attn: Any
        mlp: Any
        block, attn, mlp = nn.Module(), nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attn, name, nn.Linear(32, 32, bias=False))
        attn.q_bias, attn.v_bias = (nn.Parameter(torch.randn(32)) for _ in range(2))
        attn.inner_attn_ln, attn.proj = nn.LayerNorm(32), nn.Linear(32, 32)
        mlp.w1, mlp.w2, mlp.ffn_ln, mlp.w3 = nn.Linear(32, 48), nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 32)
        block.norm1, block.attn, block.norm2, block.mlp = nn.LayerNorm(32), attn, nn.LayerNorm(32), mlp
        return block


def test_a_tower_begins_from_evas_own_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Theirs()
    save_file({f"visual.{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    tower = TINY.build(str(tmp_path), -1)
    ours = dict(tower.tower.named_parameters())
    assert {our_name(name) for name in theirs.state_dict()} == {*ours, "head.weight", "head.bias"}
    block, layer = theirs.blocks[1], tower.blocks[1]
    assert torch.equal(layer.attention.value.bias, block.attn.v_bias)
    assert torch.equal(layer.mlp.up.weight, block.mlp.w2.weight)
    assert torch.equal(ours["positions"], theirs.pos_embed[0])
    # The feed-forward branch as EVA computes it.
    x = torch.randn(3, 5, 32)
    hidden = nn.functional.silu(block.mlp.w1(x)) * block.mlp.w2(x)
    expected = block.mlp.w3(
        nn.functional.layer_norm(hidden, (48,), block.mlp.ffn_ln.weight, block.mlp.ffn_ln.bias, 1e-6)
    )
    torch.testing.assert_close(layer.mlp(x), expected)
    with pytest.raises(ValueError, match=r"have \(48, 32\) for layers\.0\.mlp\.gate\.weight, .* says \(40, 32\); mend"):
        replace(TINY, intermediate_size=40).build(str(tmp_path), -1)
    with pytest.raises(ValueError, match=r"have nothing for layers\.2\."):
        replace(TINY, layers=3).build(str(tmp_path), -1)


def test_patches_know_each_other_and_where_they_are() -> None:
    torch.manual_seed(0)
    net = EvaNet(TINY)
    tower = TINY.build(None, -1, "keep", True)
    tower.tower.load_state_dict(net.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    features = tower(pixels)
    assert features.shape == (2, 17, 32)
    torch.testing.assert_close(tower(pixels[1:]), features[1:], rtol=1e-5, atol=1e-6)
    nn.init.zeros_(tower.tower.positions)  # what is left of places is the turning
    moved = tower(pixels.roll(8, dims=-1))[:, 1:].unflatten(1, (4, 4))
    assert not torch.allclose(moved.roll(-1, dims=2), tower(pixels)[:, 1:].unflatten(1, (4, 4)), atol=1e-4)
