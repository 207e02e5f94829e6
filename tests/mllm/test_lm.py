"""Decoders of every family are those of transformers, document by document, and documents in a pack are as alone."""

from dataclasses import replace

import pytest
import torch

from mllm.archs import OPT, Gemma, Llama, MiniCPM, Mistral, Qwen2, TextArch
from mllm.rope import NTK, LinearRope, Llama3Rope, RopeScaling, YaRN
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
    theirs = getattr(transformers, arch.family)._from_config(small.config(), attn_implementation="sdpa").eval()
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
