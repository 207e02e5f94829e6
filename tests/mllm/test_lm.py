"""Decoders of every family are those of transformers, document by document, and documents in a pack are as alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mllm.archs import GLM, MPT, OPT, T5, Gemma, GPTNeoX, Llama, MiniCPM, Mistral, Phi3, Qwen2, TextArch
from mllm.fusion import CrossAttention, PromptAdapter
from mllm.mpt import alibi_slopes
from mllm.objectives import NextToken
from mllm.recipe import Full, override
from mllm.recipes import by_name
from mllm.rope import NTK, LinearRope, Llama3Rope, RopeScaling, YaRN
from mllm.tune import apply_tuning
from ops.attention import falling
from tests.mllm.toys import PICTURE, Doc, built, logits, packed, toy

LLAMA = Llama(vocab_size=32_000, hidden_size=4096, layers=32, heads=32, kv_heads=32, intermediate_size=11_008)
FULL: dict[str, tuple[TextArch, int]] = {
    "llama-2-7b": (LLAMA, 6_738_415_616),
    "qwen1.5-7b": (
        Qwen2(vocab_size=151_936, hidden_size=4096, layers=32, heads=32, kv_heads=32, intermediate_size=11_008),
        7_721_324_544,
    ),
    "mistral-7b": (
        Mistral(vocab_size=32_000, hidden_size=4096, layers=32, heads=32, kv_heads=8, intermediate_size=14_336),
        7_241_732_096,
    ),
    "phi-3-mini": (
        Phi3(vocab_size=32_064, hidden_size=3072, layers=32, heads=32, kv_heads=32, intermediate_size=8192),
        3_821_079_552,
    ),
    "gemma-2b": (
        Gemma(
            vocab_size=256_000,
            hidden_size=2048,
            layers=18,
            heads=8,
            kv_heads=1,
            head_size=256,
            intermediate_size=16_384,
        ),
        2_506_172_416,
    ),
    "minicpm-2.4b": (
        MiniCPM(vocab_size=122_753, hidden_size=2304, layers=40, heads=36, kv_heads=36, intermediate_size=5760),
        2_724_880_896,
    ),
    "opt-6.7b": (OPT(hidden_size=4096, layers=32, heads=32, intermediate_size=16_384), 6_658_473_984),
    "mpt-7b": (MPT(hidden_size=4096, layers=32, heads=32), 6_649_286_656),
    "redpajama-3b": (GPTNeoX(hidden_size=2560, layers=32, heads=32, intermediate_size=10_240), 2_775_864_320),
    "neox-20b": (
        GPTNeoX(hidden_size=6144, layers=44, heads=64, intermediate_size=24_576, turned=0.25, parallel=True),
        20_554_567_680,
    ),
    "glm-4-9b": (
        GLM(vocab_size=151_552, hidden_size=4096, layers=40, heads=32, kv_heads=2, intermediate_size=13_696),
        9_399_951_360,
    ),
}
DOCS: list[Doc] = [[5, 6, 7, 8, 9], [3, PICTURE, 10, 11, 12], [2, 100]]


@pytest.mark.parametrize("name", FULL)
def test_a_family_is_transformers_own(name: str) -> None:
    """Their weights and their attention on one document; ours laid out in a pack."""
    import transformers

    arch, parameters = FULL[name]
    small = arch.tiny(128)
    assert type(small) is type(arch)
    model = built(toy(arch=small))
    attention = "eager" if isinstance(arch, MPT) else "sdpa"  # MPT has no other of its own
    theirs = getattr(transformers, arch.family)._from_config(small.config(), attn_implementation=attention).eval()
    theirs.load_state_dict(model.lm.model.state_dict())
    ours, at = logits(model, packed(toy(arch=small), DOCS)), 0
    for doc in DOCS:
        tokens = [item for item in doc if item is not None]
        if len(tokens) == len(doc):
            with torch.no_grad():
                expected = theirs(torch.tensor([tokens])).logits[0]
            torch.testing.assert_close(ours[at : at + len(doc)], expected, rtol=1e-4, atol=1e-4)
        at += len(doc) + 3 * (len(doc) - len(tokens))
    with torch.device("meta"):
        whole = getattr(transformers, arch.family)(arch.config())
    assert sum(p.numel() for p in whole.parameters()) == parameters


@pytest.mark.parametrize("name", FULL)
def test_a_document_in_a_pack_is_as_alone(name: str) -> None:
    vlm = toy(arch=FULL[name][0].tiny(128))
    model = built(vlm)
    together, at = logits(model, packed(vlm, DOCS)), 0
    for doc in DOCS:
        alone = logits(model, packed(vlm, [doc]))
        torch.testing.assert_close(together[at : at + len(alone)], alone, rtol=1e-4, atol=1e-4)
        at += len(alone)


@pytest.mark.parametrize("heads", [4, 6, 32])
def test_alibi_falls_as_in_mpt(heads: int) -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    theirs = build_mpt_alibi_tensor(heads, 9)[:, 0]
    slopes = torch.tensor(alibi_slopes(heads))
    torch.testing.assert_close(slopes, theirs[:, 8] - theirs[:, 7])
    torch.testing.assert_close(falling(slopes, 9)[:, 8], theirs)


def test_alibi_is_not_for_packs_that_ranks_share_nor_for_prompts() -> None:
    smoke = by_name("vila_smoke")
    mpt = replace(
        smoke, model=replace(smoke.model, lm=replace(smoke.vlm.lm, arch=MPT(hidden_size=64, layers=2, heads=4)))
    )
    with pytest.raises(ValueError, match="which 'mpt' cannot; take context=1"):
        override(mpt, ['stages.sft.parallel={"kind": "fsdp", "context": 2}'])
    with pytest.raises(ValueError, match="own k_proj and v_proj, and PackedBlock has none"):
        toy(PromptAdapter(prompts=4), arch=MPT(hidden_size=64, layers=2, heads=4)).meta()


SCALINGS: dict[str, RopeScaling] = {
    "linear": LinearRope(factor=2.0),
    "ntk": NTK(factor=4.0),
    "yarn": YaRN(factor=4.0, original=128),
    "llama3": Llama3Rope(original=64),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotary_positions_are_those_of_the_formulas(name: str) -> None:
    scaling = SCALINGS[name]
    arch = replace(LLAMA.tiny(128), rope_scaling=scaling)
    rope = built(toy(arch=arch)).lm.decoder.rotary_emb
    plain = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    found = rope.inv_freq
    match scaling:
        case LinearRope():
            torch.testing.assert_close(found, plain / 2)
        case NTK():
            torch.testing.assert_close(found[-1], plain[-1] / 4)  # the slowest reaches four times as far
            torch.testing.assert_close(found[0], plain[0])
        case YaRN():
            torch.testing.assert_close(found[0], plain[0])
            torch.testing.assert_close(found[-1], plain[-1] / 4)
            assert rope.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
        case Llama3Rope():
            waves = 2 * torch.pi / plain
            torch.testing.assert_close(found[waves < 16], plain[waves < 16])
            torch.testing.assert_close(found[waves > 64], plain[waves > 64] / 8)


FLAN_T5_XL = T5(hidden_size=2048, layers=24, heads=32, intermediate_size=5120)
ANSWERED: list[Doc] = [[5, 6, 7, 8, 9, 10], [3, 20, 21], [2, 100, 101, 102, 103]]


def test_prompts_are_read_and_answers_written_as_by_transformers() -> None:
    """Teacher forcing on each document alone; ours in one pack, at the pack's own positions."""
    from transformers import T5ForConditionalGeneration

    vlm = toy(arch=FLAN_T5_XL.tiny(128))
    model = built(vlm).eval()
    theirs: T5ForConditionalGeneration = model.lm.model
    ours, at = logits(model, packed(vlm, ANSWERED, learn_from=2)), 0
    for doc in ANSWERED:
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([doc[:2]]), labels=torch.tensor([doc[2:]])).logits[0]
        # the last position of a document predicts what comes after it, and nothing is learned there
        torch.testing.assert_close(ours[at + 1 : at + len(doc) - 1], expected, rtol=1e-4, atol=1e-4)
        at += len(doc)
    with torch.device("meta"):
        whole = T5ForConditionalGeneration(FLAN_T5_XL.config())
    shared = FLAN_T5_XL.vocab_size * FLAN_T5_XL.hidden_size
    assert sum(p.numel() for p in whole.parameters()) in (2_849_757_184, 2_849_757_184 - shared)


def test_an_encoder_decoder_sees_pictures_in_its_prompt_and_trains_on_any_pack() -> None:
    vlm = toy(arch=FLAN_T5_XL.tiny(128))
    docs: list[Doc] = [[3, PICTURE, 10, 11, 12], [5, 6, 7, 8]]
    for chosen in (docs, docs[1:], []):
        model = built(vlm)
        apply_tuning(model, {"connector": Full(lr=1.0)})
        output = NextToken()(model, packed(vlm, chosen, learn_from=6 if chosen == docs else 2))
        output.sum.backward()
        grads = [p.grad for p in model.connector.parameters()]
        assert all(g is not None for g in grads)
        assert any(bool(g.any()) for g in grads if g is not None) == (chosen == docs)
    alone = logits(model, packed(vlm, docs[1:], learn_from=2))
    beside = logits(model, packed(vlm, [[9, 8, 7], docs[1]], learn_from=2))
    torch.testing.assert_close(beside[3:], alone, rtol=1e-4, atol=1e-4)


def test_what_goes_between_layers_is_for_decoders() -> None:
    with pytest.raises(ValueError, match="fusion 'cross_attention' works inside a decoder's layers, and 't5' is none"):
        toy(CrossAttention(), arch=FLAN_T5_XL.tiny(128))


def test_a_loaded_decoder_has_the_positions_that_the_recipe_says(tmp_path: Path) -> None:
    arch = LLAMA.tiny(128)
    built(toy(arch=arch)).lm.model.save_pretrained(tmp_path)
    for wanted in (arch, replace(arch, rope_theta=1e6), replace(arch, rope_scaling=LinearRope(factor=2.0))):
        spec = toy(arch=wanted).lm
        found = replace(spec, weights="mine").build(lambda _: str(tmp_path)).decoder.rotary_emb.inv_freq
        assert torch.equal(found, spec.build(str).decoder.rotary_emb.inv_freq)


def test_a_stage_raises_the_rotary_base_for_all_that_come_after_it() -> None:
    smoke = by_name("vila_smoke")
    changed = override(smoke, ["stages.pretrain.rope_theta=1e6"])
    bases = [changed.model_of(stage).lm.arch.rope_theta for stage in changed.stages]  # type: ignore[union-attr]  # a Llama
    assert bases == [1e4, 1e6, 1e6]
    assert [smoke.model_of(stage) for stage in smoke.stages] == [smoke.model] * 3
    opt = OPT(hidden_size=64, layers=2, heads=4, intermediate_size=96)
    stages = tuple(replace(stage, rope_theta=1e6) for stage in smoke.stages)
    with pytest.raises(ValueError, match="rope_theta is the base of rotary positions, and 'opt' has none"):
        replace(smoke, model=replace(smoke.model, lm=replace(smoke.vlm.lm, arch=opt)), stages=stages)
