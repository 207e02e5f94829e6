"""Axes that cannot be joined are refused when a recipe is made, with what does not fit and what would."""

import pytest

from mllm.recipe import RecipeError, override
from mllm.recipes import by_name

IMPOSSIBLE = [
    # recipe, changes, what its reason must say
    ("clip_b32", ['model.connector={"kind": "q_former"}'], "no field 'connector'; of kind 'dual_tower' its fields are"),
    ("mae_b16", ['model.fusion={"kind": "splice"}'], "no field 'fusion'; of kind 'masked_image' its fields are"),
    (
        "crome_flan_t5_xxl",
        ['model.fusion={"kind": "cross_attention"}'],
        "'cross_attention' works inside a decoder's layers, and 't5' is none; take splice or pre_lm_adapter",
    ),
    (
        "crome_flan_t5_xxl",
        ['model.fusion={"kind": "routed_experts"}'],
        "works inside a decoder's layers, and 't5' is none",
    ),
    (
        "cogvlm_17b",
        ['model.lm.arch={"kind": "opt", "hidden_size": 4096, "layers": 32, "heads": 32, "intermediate_size": 16384}'],
        "'routed_experts' knows layers of Llama's form, and 'opt' has others; take a llama, qwen2 or mistral",
    ),
    ("llava_15_7b", ['model.connector={"kind": "sva"}'], "'sva' takes several towers and the encoder has 1"),
    ("mini_gemini_7b", ['model.connector={"kind": "mlp"}'], "'mlp' takes one tower and the encoder has 2; take sva or"),
    ("minicpm_v_20", ['model.connector={"kind": "mlp"}'], "slices have shapes of their own"),
    (
        "llava_next_7b",
        ['model.connector={"kind": "q_former"}'],
        "'unpad' cuts margins off a grid of features, and connector 'q_former' keeps none",
    ),
    # 64 are the square of 8, and yet no grid
    (
        "llava_next_7b",
        ['model.connector={"kind": "perceiver"}'],
        "connector 'perceiver' keeps none; take one that does",
    ),
    (
        "llava_next_7b",
        ['model.fusion={"kind": "cross_attention"}'],
        "tells pictures apart by their tiles, and tiling 'any_res'",
    ),
    (
        "llava_15_7b",
        ['tiling={"kind": "any_res", "size": 336}'],
        "features joined as 'unpad', and this model joins 'tiles'",
    ),
    ("llava_15_7b", ["tiling.size=224"], "cuts tiles of 224 pixels and the encoder takes 336"),
    ("bliva_7b", ['model.connector={"kind": "pixel_shuffle"}'], "257"),
    ("llama_adapter_7b", ["model.connector.queries=12"], "10 prompts take as many visual tokens of a tile, or one"),
    (
        "crome_7b",
        ['model.connector={"kind": "q_former"}'],
        "32 visual tokens of a tile are queries, and the connector makes 32",
    ),
    ("vila_15_3b", ["model.encoder.cls=keep"], "'siglip_vision' has no CLS token; take 'drop'"),
    ("llava_15_7b", ["model.encoder.layer=-26"], "the tower has 24 layers; take one of -25 to -1"),
    (
        "llava_15_7b",
        ['stages.sft.objective={"kind": "contrastive"}'],
        "'vlm' cannot learn 'contrastive'; it learns next_token",
    ),
    ("vit_b16", ['stages.supervised.objective={"kind": "next_token"}'], "kind 'classifier' cannot learn 'next_token'"),
    ("llava_15_7b", ['stages.sft.objective={"kind": "dpo"}'], "dpo compares with a reference; add reference_log_probs"),
    ("llava_15_7b", ["stages.sft.context=8192"], "context=8192 exceeds the language model's 4096"),
    (
        "openflamingo_9b",
        ['stages.pretrain.parallel={"kind": "fsdp", "context": 2}'],
        "under the fusion 'cross_attention' a rank must see all of it; take context=1",
    ),
]


@pytest.mark.parametrize(("name", "changes", "reason"), IMPOSSIBLE, ids=lambda value: str(value)[:48])
def test_what_cannot_be_joined_is_refused_with_the_reason(name: str, changes: list[str], reason: str) -> None:
    with pytest.raises(RecipeError) as error:
        override(by_name(name), changes)
    assert reason in str(error.value)
