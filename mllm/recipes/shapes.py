"""Towers and language models that several recipes name, by their published shapes."""

from mllm.archs import T5, Mistral, Qwen2
from mllm.encoders import ClipVision, ConvNeXt, Dinov2, Eva02, EvaClip, InternViT, SiglipVision
from mllm.lm import Llama

CLIP_L_224 = ClipVision(hidden_size=1024, layers=24, heads=16, intermediate_size=4096, patch=14, image=224)
CLIP_L_336 = ClipVision(hidden_size=1024, layers=24, heads=16, intermediate_size=4096, patch=14, image=336)
CLIP_H_224 = ClipVision(
    hidden_size=1280, layers=32, heads=16, intermediate_size=5120, patch=14, image=224, activation="gelu"
)
OPENCLIP_BIGG = ClipVision(
    hidden_size=1664, layers=48, heads=16, intermediate_size=8192, patch=14, image=224, activation="gelu"
)
SIGLIP_SO400M = SiglipVision(hidden_size=1152, layers=27, heads=16, intermediate_size=4304, patch=14, image=384)
DINOV2_GIANT = Dinov2(hidden_size=1536, layers=40, heads=24, swiglu=True)
INTERNVIT_300M = InternViT(hidden_size=1024, layers=24, heads=16, intermediate_size=4096)
INTERNVIT_6B = InternViT(
    hidden_size=3200,
    layers=48,
    heads=25,
    intermediate_size=12_800,
    qk_norm=True,
    qkv_bias=False,
    norm="rms_norm",
)
INTERNVIT_6B_V15 = InternViT(  # without the last three layers
    hidden_size=3200,
    layers=45,
    heads=25,
    intermediate_size=12_800,
    qk_norm=True,
    qkv_bias=False,
    norm="rms_norm",
)
EVA_G = EvaClip(hidden_size=1408, layers=39, heads=16, intermediate_size=6144)  # BLIP-2 leaves the fortieth layer away
EVA_E = EvaClip(hidden_size=1792, layers=63, heads=16, intermediate_size=15_360, post_norm=True)
EVA02_L = Eva02(hidden_size=1024, layers=24, heads=16, intermediate_size=2730, image=336)
CONVNEXT_L = ConvNeXt(depths=(3, 3, 27, 3), hidden_sizes=(192, 384, 768, 1536))
CONVNEXT_XXL = ConvNeXt(depths=(3, 4, 30, 3), hidden_sizes=(384, 768, 1536, 3072))

SIGLIP_NORM = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET_NORM = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

LLAMA_7B = Llama(
    vocab_size=32_000,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    intermediate_size=11_008,
    context=2048,
    norm_eps=1e-6,
)
VICUNA_7B = Llama(vocab_size=32_000, hidden_size=4096, layers=32, heads=32, kv_heads=32, intermediate_size=11_008)
VICUNA_13B = Llama(vocab_size=32_000, hidden_size=5120, layers=40, heads=40, kv_heads=40, intermediate_size=13_824)
LLAMA3_8B = Llama(
    vocab_size=128_256,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    intermediate_size=14_336,
    context=8192,
    rope_theta=500_000.0,
)
YI_34B = Llama(
    vocab_size=64_000,
    hidden_size=7168,
    layers=60,
    heads=56,
    kv_heads=8,
    intermediate_size=20_480,
    rope_theta=5_000_000.0,
)
SHEARED_LLAMA_2_7B = Llama(
    vocab_size=32_000, hidden_size=2560, layers=32, heads=20, kv_heads=20, intermediate_size=6912
)
INTERNLM2_20B = Llama(
    vocab_size=92_544,
    hidden_size=6144,
    layers=48,
    heads=48,
    kv_heads=8,
    intermediate_size=16_384,
    context=32_768,
    rope_theta=1_000_000.0,
)
MISTRAL_7B = Mistral(  # of v0.2, which has no window
    vocab_size=32_000,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    intermediate_size=14_336,
    context=32_768,
    rope_theta=1_000_000.0,
)
QWEN15_0_5B = Qwen2(
    vocab_size=151_936, hidden_size=1024, layers=24, heads=16, kv_heads=16, intermediate_size=2816, tied=True
)
QWEN15_7B = Qwen2(vocab_size=151_936, hidden_size=4096, layers=32, heads=32, kv_heads=32, intermediate_size=11_008)
QWEN15_14B = Qwen2(vocab_size=152_064, hidden_size=5120, layers=40, heads=40, kv_heads=40, intermediate_size=13_696)
QWEN15_72B = Qwen2(vocab_size=152_064, hidden_size=8192, layers=80, heads=64, kv_heads=64, intermediate_size=24_576)
QWEN15_110B = Qwen2(vocab_size=152_064, hidden_size=8192, layers=80, heads=64, kv_heads=8, intermediate_size=49_152)
FLAN_T5_XXL = T5(hidden_size=4096, layers=24, heads=64, intermediate_size=10_240)
