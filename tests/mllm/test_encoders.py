"""Towers: sizes known from their shapes alone, features as transformers' own classes give them, several at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.encoders import Blind, Encoder, Encoders, NFNet, ResNet, VisionArch, ViT
from mllm.nfnet import StandardConv
from mllm.recipes import shapes
from ops.images import normalize, patchify

VIT_B = ViT(hidden_size=768, layers=12, heads=12, intermediate_size=3072)


def parameters(arch: VisionArch, layer: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in arch.build(None, layer).parameters())


@pytest.mark.parametrize(
    ("arch", "tile", "tokens", "width", "count"),
    [
        (shapes.CLIP_L_336, 336, 576, 1024, 303_507_456),
        (shapes.OPENCLIP_BIGG, 224, 256, 1664, 1_842_777_344),
        (shapes.SIGLIP_SO400M, 384, 729, 1152, 412_987_248),
        (shapes.DINOV2_GIANT, 518, 1369, 1536, 1_136_479_232),
        (shapes.INTERNVIT_300M, 448, 1024, 1024, 304_012_288),
        (shapes.INTERNVIT_6B, 448, 1024, 3200, 5_905_251_200),
        (shapes.EVA_G, 224, 256, 1408, 985_952_256),
        (shapes.EVA_E, 224, 256, 1792, 4_280_908_800),
        (VIT_B, 224, 196, 768, 85_798_656),
        (shapes.CONVNEXT_L, 320, 100, 1536, 196_230_336),
        (shapes.CONVNEXT_XXL, 1024, 1024, 3072, 843_398_016),
        (ResNet(), 224, 49, 2048, 23_508_032),
        # 304.43 million with the projection of CLS to 768, which no tower here has
        (shapes.EVA02_L, 336, 576, 1024, 304_432_832 - 768 * 1025),
        # 438.36 million with the last convolution, to 3,072, and the classes
        (NFNet(), 320, 100, 1536, 438_359_116 - (1536 + 2) * 3072 - 3073 * 1000),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_shapes_have_their_published_sizes(arch: VisionArch, tile: int, tokens: int, width: int, count: int) -> None:
    assert (arch.tokens(tile), arch.width) == (tokens, width)
    assert parameters(arch, -1) == count


ALL = [
    shapes.CLIP_L_336,
    shapes.SIGLIP_SO400M,
    shapes.DINOV2_GIANT,
    shapes.INTERNVIT_6B,
    shapes.EVA_G,
    shapes.EVA_E,
    VIT_B,
    shapes.CONVNEXT_L,
    replace(shapes.CONVNEXT_XXL, grid=96),
    ResNet(),
    shapes.EVA02_L,
    NFNet(),
]


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.kind)
def test_a_tiny_tower_is_small_and_gives_what_it_says(arch: VisionArch) -> None:
    encoder = Encoder(arch=arch, layer=-1).tiny()
    assert type(encoder.arch) is type(arch)
    module = encoder.build(str)
    assert sum(p.numel() for p in module.parameters()) < 200_000
    tile = getattr(encoder.arch, "image", 64)
    tiles = torch.randint(0, 256, (2, 3, tile, tile), dtype=torch.uint8)
    features = module(tiles)
    assert features.shape == (2, encoder.tokens(tile), encoder.width)
    torch.testing.assert_close(module(tiles[1:]), features[1:], rtol=1e-4, atol=1e-5)  # a tile is alone in company
    features.square().sum().backward()
    unused = {id(p) for part in module.unused() for p in part.parameters()}
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in unused), name


@pytest.mark.parametrize(
    "arch",
    [
        arch
        for arch in ALL
        if hasattr(arch, "layers") and not getattr(arch, "post_norm", False) and arch.kind != "eva02"
    ],
    ids=lambda arch: arch.kind,
)
@pytest.mark.parametrize(("layer", "normed"), [(-2, False), (-1, True)])
def test_features_are_transformers_hidden_states(arch: Any, layer: int, normed: bool) -> None:
    torch.manual_seed(0)
    small = arch.tiny()
    tower = small.build(None, layer, "drop", normed)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pixels = torch.randn(2, 3, small.image, small.image)
    theirs = tower.tower(pixels, output_hidden_states=True)
    found = theirs.last_hidden_state if normed else theirs.hidden_states[layer]
    if arch.kind == "clip_vision" and normed:  # which transformers puts to the pooled feature alone
        found = tower.tower.post_layernorm(found)
    torch.testing.assert_close(tower(pixels), found[:, tower.first :], rtol=1e-4, atol=1e-4)


def test_nfnets_convolutions_keep_the_variance_whatever_their_weights_size() -> None:
    torch.manual_seed(0)
    convolution = StandardConv(64, 64, 3)
    x = torch.randn(4, 64, 16, 16)
    out = convolution(x)
    assert out.std().item() == pytest.approx(1, rel=0.1)
    with torch.no_grad():
        convolution.weight.mul_(7).add_(3)
    torch.testing.assert_close(convolution(x), out, rtol=1e-3, atol=1e-3)


def test_towers_of_our_own_are_kept_and_read_back(tmp_path: Path) -> None:
    for number, arch in enumerate((shapes.EVA02_L.tiny(), NFNet().tiny(), Blind())):
        encoder = Encoder(arch=arch, layer=-1)
        module: Any = encoder.build(str)
        module.tower.tower.save_pretrained(tmp_path / str(number))
        again: Any = replace(encoder, weights="mine").build(lambda _, n=number: str(tmp_path / str(n)))
        tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        assert torch.equal(module(tiles), again(tiles))
    with pytest.raises(ValueError, match="mend the arch"):
        replace(shapes.EVA02_L.tiny(), layers=9).build(str(tmp_path / "0"), -1)
    with pytest.raises(ValueError, match=r"there is no model.safetensors, which a NFModel is read from"):
        NFNet().tiny().build(str(tmp_path), -1)


def test_post_norm_puts_the_norm_behind_each_branch() -> None:
    torch.manual_seed(0)
    tower = shapes.EVA_E.tiny().build(None, 1)
    block: Any = tower.units()[0]
    x = torch.randn(1, 5, 32)
    attended = x + block.layer_norm1(block.self_attn(x)[0])
    torch.testing.assert_close(block(x), attended + block.layer_norm2(block.mlp(attended)))


def test_cls_comes_first_where_it_is_kept() -> None:
    encoder = Encoder(arch=shapes.CLIP_L_224).tiny()
    kept = replace(encoder, cls="keep")
    assert kept.tokens(32) == encoder.tokens(32) + 1
    module = kept.build(str)
    features = module(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8))
    assert features.shape[1] == 17
    with pytest.raises(ValueError, match="no CLS token; take 'drop'"):
        Encoder(arch=shapes.SIGLIP_SO400M.tiny(), cls="keep").build(str)


@pytest.mark.parametrize("arch", [arch for arch in ALL if hasattr(arch, "layers")], ids=lambda arch: arch.kind)
def test_positions_are_stretched_only_where_that_is_asked(arch: Any) -> None:
    encoder: Any = Encoder(arch=arch).tiny()
    larger = encoder.arch.image + 2 * encoder.arch.patch
    with pytest.raises(ValueError, match=f"tiles of {larger} pixels and the encoder takes {encoder.arch.image}"):
        encoder.tokens(larger)
    stretched = replace(encoder, interpolate=True)
    side = encoder.arch.image // encoder.arch.patch + 2
    tiles = torch.randint(0, 256, (1, 3, larger, larger), dtype=torch.uint8)
    assert stretched.build(str)(tiles).shape == (1, stretched.tokens(larger), 32) == (1, side * side, 32)


@pytest.mark.parametrize("arch", [shapes.CLIP_L_336, shapes.SIGLIP_SO400M], ids=lambda arch: arch.kind)
def test_a_slice_of_the_towers_own_shape_is_a_tile(arch: Any) -> None:
    """And what fills shorter slices up is seen by nobody."""
    torch.manual_seed(0)
    encoder: Any = Encoder(arch=arch).tiny()
    module = encoder.build(str).eval()
    side, patch = encoder.arch.image // 8, 8
    tile = torch.randint(0, 256, (1, 3, encoder.arch.image, encoder.arch.image), dtype=torch.uint8)
    wide = torch.randint(0, 256, (1, 3, 16, 48), dtype=torch.uint8)
    patches = [patchify(x, patch).reshape(-1, 3 * patch * patch) for x in (wide, tile)]
    both = module(torch.cat(patches), [(2, 6), (side, side)])
    torch.testing.assert_close(both[1:], module(tile), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:1, :12], module(patches[0], [(2, 6)]), rtol=1e-4, atol=1e-5)


def test_several_towers_see_the_same_tile_each_at_its_size() -> None:
    bundle = Encoders(
        towers=(
            Encoder(arch=shapes.CLIP_L_336, weights="clip"),
            Encoder(arch=replace(shapes.CONVNEXT_L, grid=96), weights="convnext", layer=-1),
        ),
        sizes=(336, 768),
    )
    assert bundle.tokens(768) == (576, 9216)
    assert bundle.width == (1024, 2880)
    with pytest.raises(ValueError, match="a tower looks at 768"):
        bundle.tokens(336)
    small = bundle.tiny()
    tiles = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = small.build(str)(tiles)
    assert [tuple(x.shape) for x in found] == [
        (2, tokens, width) for tokens, width in zip(small.tokens(64), small.width, strict=True)
    ]
    one = small.towers[0].build(str)
    assert normalize(tiles, one.mean, one.std).shape == tiles.shape
    with pytest.raises(ValueError, match="give two towers or more"):
        Encoders(towers=bundle.towers[:1], sizes=(336,))
