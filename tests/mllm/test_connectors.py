"""Connectors: as many tokens as they say, gradients everywhere, and transformers' own classes' numbers where there are some."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mllm.connectors import (
    MLP,
    SVA,
    Abstractor,
    Branches,
    Connector,
    ConvGLU,
    CrossPool,
    Linear,
    PatchMining,
    Perceiver,
    PixelShuffle,
    Pool,
    QFormer,
    QLLaMA,
    Transformer,
    bare,
    read_weights,
)

ONE: list[tuple[Connector, int, int]] = [
    (Linear(), 256, 256),
    (MLP(), 576, 576),
    (PixelShuffle(), 1024, 256),  # InternVL
    (PixelShuffle(), 729, 196),  # VILA-1.5
    (PixelShuffle(depth=1, norm=False), 576, 144),  # VILA's ablation
    (Pool(), 576, 144),  # LLaVA-NeXT-Video
    (Pool(before=True), 576, 144),
    (ConvGLU(), 9216, 2306),  # CogVLM2
    (ConvGLU(stride=1), 1225, 1227),  # CogVLM
    (Transformer(), 576, 576),
    (QFormer(), 257, 32),
    (Perceiver(), 256, 64),
    (CrossPool(queries=256), 1024, 256),  # Qwen-VL
    (CrossPool(queries=96), 1024, 96),  # MiniCPM-Llama3-V 2.5
    (Abstractor(), 257, 65),
    (Branches(parts=(QFormer(), Linear())), 257, 289),  # BLIVA
    (QLLaMA(), 256, 96),  # InternVL 1.0
]
SEVERAL: list[tuple[Connector, tuple[int, ...], int]] = [
    (SVA(), (576, 729, 729, 9216), 600),
    (PatchMining(), (576, 9216), 576),
]


@pytest.mark.parametrize(("connector", "patches", "tokens"), [*ONE, *SEVERAL], ids=lambda x: getattr(x, "kind", str(x)))
def test_tokens_of_the_papers(connector: Any, patches: int, tokens: int) -> None:
    assert connector.tokens(patches) == tokens


@pytest.mark.parametrize("patches", [16, 25])
@pytest.mark.parametrize("connector", [one for one, _, _ in ONE], ids=lambda x: x.kind)
def test_a_tile_becomes_so_many_tokens_alone_in_company(connector: Any, patches: int) -> None:
    torch.manual_seed(0)
    small = connector.tiny()
    module = small.build(32, 48)
    features = torch.randn(3, patches, 32)
    tokens = module(features)
    assert tokens.shape == (3, small.tokens(patches), 48)
    assert tokens._base is None  # FSDP2 hangs its hooks on what is no view
    torch.testing.assert_close(module(features[1:2]), tokens[1:2], rtol=1e-4, atol=1e-5)
    tokens.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    ("connector", "patches"), [(SVA(), (16, 9, 9, 64)), (PatchMining(), (16, 64))], ids=["sva", "mining"]
)
def test_several_towers_become_so_many_tokens(connector: Any, patches: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    small = connector.tiny()
    widths = (32, 24, 16, 48)[: len(patches)]
    module = small.build(widths, 48)
    features = tuple(torch.randn(3, count, width) for count, width in zip(patches, widths, strict=True))
    tokens = module(features)
    assert tokens.shape == (3, small.tokens(patches), 48)
    assert tokens._base is None
    torch.testing.assert_close(module(tuple(x[1:2] for x in features)), tokens[1:2], rtol=1e-4, atol=1e-5)
    tokens.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(ValueError, match="tower"):
        small.tokens((16,))


def test_what_mining_finds_lies_in_the_features_own_window() -> None:
    torch.manual_seed(0)
    module = PatchMining(window=2).build((8, 8), 8)
    low, high = torch.randn(1, 16, 8), torch.randn(1, 64, 8)
    before = module((low, high))
    changed = high.clone()
    changed[0, 8 * 2 + 5] += 1  # row 2, column 5: the window of row 1, column 2
    moved = (module((low, changed)) - before).abs().sum(2)[0].nonzero().flatten().tolist()
    assert moved == [1 * 4 + 2]


def numbers(connector: Any, d_in: Any, d_out: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in connector.build(d_in, d_out).parameters())


def test_sizes_of_the_papers() -> None:
    assert numbers(MLP(), 1024, 4096) == 1024 * 4096 + 4096 + 4096**2 + 4096
    assert numbers(PixelShuffle(), 3200, 6144) == 2 * 12_800 + 12_800 * 6144 + 6144 + 6144**2 + 6144  # InternVL 1.5
    assert numbers(PixelShuffle(depth=1, norm=False), 1024, 4096) == 4096 * 4096 + 4096
    # BERT-base's twelve layers without its feed-forward for text, cross-attention in six of them, and a matrix
    bert, cross = 12 * 7_087_872, 6 * (2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + 1536)
    assert numbers(QFormer(), 1408, 768) == bert + cross + 1536 + 32 * 768 + 768 * 768 + 768
    resampler = 6 * (4 * 1024 * 512 + 2 * 4 * 1024**2 + 6 * 1024)
    assert numbers(Perceiver(), 1024, 1024) == resampler + 64 * 1024 + 2048 + 1024**2 + 1024


def test_q_former_is_transformers_own() -> None:
    from transformers import Blip2QFormerModel

    torch.manual_seed(0)
    small = QFormer().tiny()
    module: Any = small.build(16, 24)
    theirs = Blip2QFormerModel(small.config(16)).eval()
    theirs.load_state_dict(module.model.state_dict())
    features = torch.randn(2, 9, 16)
    found = theirs(query_embeds=module.queries.expand(2, -1, -1), encoder_hidden_states=features).last_hidden_state
    torch.testing.assert_close(module(features), module.project(found), rtol=1e-4, atol=1e-5)


def test_q_formers_weights_are_read_from_blip2s_form(tmp_path: Path) -> None:
    """Its own names and those that it has no use for, inside a bundle of branches too."""
    torch.manual_seed(0)
    small = QFormer().tiny()
    source: Any = small.build(16, 24)
    stored = {f"qformer.{name}": value for name, value in source.model.state_dict().items()}
    stored |= {
        "query_tokens": source.queries.detach().unsqueeze(0),
        "qformer.embeddings.word.weight": torch.zeros(2, 2),
    }
    save_file({name: value.contiguous() for name, value in stored.items()}, tmp_path / "model.safetensors")
    spec = Branches(parts=(replace(small, weights="blip2"), Linear()))
    module: Any = spec.build(16, 24)
    read_weights(spec, module, lambda name: str(tmp_path) if name == "blip2" else "")
    features = torch.randn(2, 9, 16)
    source.project = module.parts[0].project
    torch.testing.assert_close(module(features)[:, :4], source(features))
    assert bare(spec) == Branches(parts=(small, Linear()))
    wider = replace(small, weights="blip2", hidden_size=48)
    with pytest.raises(ValueError, match="are no Q-Former of the recipe's shape"):
        read_weights(wider, wider.build(16, 24), lambda _: str(tmp_path))


def test_pixel_shuffle_and_its_mlp_are_internvls() -> None:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    torch.manual_seed(0)
    config = InternVLConfig(vision_config=InternVLVisionConfig(hidden_size=16), text_config=Qwen2Config(hidden_size=24))
    theirs = InternVLMultiModalProjector(config)
    module: Any = PixelShuffle().build(16, 24)
    for ours, other in (
        (module.norm, theirs.layer_norm),
        (module.mlp.layers[0], theirs.linear_1),
        (module.mlp.layers[1], theirs.linear_2),
    ):
        ours.load_state_dict(other.state_dict())
    features = torch.randn(2, 36, 16)
    shuffled = InternVLModel.pixel_shuffle(None, features.unflatten(1, (6, 6)))  # type: ignore[arg-type]  # it asks nothing of itself
    torch.testing.assert_close(module(features), theirs(shuffled.flatten(1, 2)), rtol=1e-4, atol=1e-5)


def test_the_resampler_is_idefics() -> None:
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    torch.manual_seed(0)
    config: Any = IdeficsConfig(vision_config={"embed_dim": 32})
    config.perceiver_config.qk_layer_norms_perceiver = False
    theirs: Any = IdeficsPerceiverResampler(config, 32, depth=2, n_heads=2, head_dim=8, n_latents=4)
    module: Any = Perceiver(activation="relu").tiny().build(32, 48)
    with torch.no_grad():
        module.latents.copy_(theirs.latents)
        module.norm.load_state_dict(theirs.layer_norm.state_dict())
        for layer, (attention, mlp) in zip(module.layers, theirs.blocks, strict=True):
            for name, other in {
                "norm_features": attention.context_layer_norm,
                "norm_latents": attention.latents_layer_norm,
                "query": attention.q_proj,
                "key": attention.k_proj,
                "value": attention.v_proj,
                "out": attention.output_proj,
                "norm": mlp.ln,
                "up": mlp.fc,
                "down": mlp.c_proj,
            }.items():
                getattr(layer, name).load_state_dict(other.state_dict())
    features = torch.randn(2, 9, 32)
    torch.testing.assert_close(module(features), module.project(theirs(features)), rtol=1e-4, atol=1e-5)


def test_cross_pool_reads_slices_of_any_shape() -> None:
    """As it reads each alone, and a square one as it reads a tile."""
    torch.manual_seed(0)
    for connector in (CrossPool(queries=4, head_size=8), CrossPool(queries=5, head_size=8)):
        module: Any = connector.build(16, 32)
        features = torch.randn(2, 16, 16)
        features[0, 12:] = 1e4  # what fills up is seen by nobody
        both = module(features, [(2, 6), (4, 4)])
        torch.testing.assert_close(both[:1], module(features[:1, :12], [(2, 6)]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[1:], module(features[1:]), rtol=1e-4, atol=1e-5)


def test_cross_pool_knows_rows_from_columns() -> None:
    torch.manual_seed(0)
    module: Any = CrossPool(queries=4, head_size=8).build(16, 32)
    features = torch.randn(1, 16, 16)
    turned = features.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    assert (module(features) - module(turned)).abs().max() > 1e-4


@pytest.mark.parametrize("connector", [PixelShuffle(), Pool(), ConvGLU(), CrossPool()], ids=lambda x: x.kind)
def test_what_is_no_grid_is_refused(connector: Any) -> None:
    with pytest.raises(ValueError, match="17 features are no square grid"):
        connector.tiny().build(16, 32)(torch.randn(1, 17, 16))


def test_queries_of_a_language_model_see_each_other_both_ways_and_the_features_in_every_second_layer() -> None:
    torch.manual_seed(0)
    module: Any = QLLaMA().tiny().build(24, 48)
    assert [layer.look is not None for layer in module.layers] == [True, False]
    assert module.units() == list(module.layers)
    features = torch.randn(1, 9, 24)
    base = module(features)
    with torch.no_grad():
        module.queries[3].add_(torch.randn(32))
    assert (module(features) - base).abs().amax(2).gt(1e-6).all()  # the first query sees the last
    small = numbers(QLLaMA(), 3200, 5120)
    llama = 6_738_415_616 - 2 * 32_000 * 4096
    look = 2 * 4096**2 + 2 * 3200 * 4096 + 4096 + 3200
    assert small == llama + 16 * look + 96 * 4096 + 4096 * 5120 + 5120 + 5120**2 + 5120


def test_a_language_models_layers_are_read_where_they_were_kept(tmp_path: Path) -> None:
    first: Any = QLLaMA().tiny().build(24, 48)
    first.save_pretrained(tmp_path)
    spec = replace(QLLaMA().tiny(), weights="mine")
    second: Any = spec.build(24, 48)
    read_weights(spec, second, lambda _: str(tmp_path))
    features = torch.randn(2, 9, 24)
    assert torch.equal(first(features), second(features))
    assert bare(spec) == QLLaMA().tiny()
