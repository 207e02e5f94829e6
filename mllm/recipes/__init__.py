"""Recipes by name. A recipe is a function that returns a complete value; add yours here and every test will find it."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from mllm.recipe import Recipe, RecipeError
from mllm.recipes.adapter import llama_adapter_7b
from mllm.recipes.albef import albef, blip_base, blip_large
from mllm.recipes.blip import bliva_7b, instructblip_7b, minigpt4_7b
from mllm.recipes.blip2 import blip2_flan_t5_xl, blip2_opt_2_7b, blip2_opt_6_7b, blip2_stage1
from mllm.recipes.cambrian import cambrian_1_8b, cambrian_1_13b, cambrian_1_34b
from mllm.recipes.clip import clip_b16, clip_b32, clip_l14, openclip_h14
from mllm.recipes.coca import coca_base, coca_large
from mllm.recipes.cogvlm import cogagent_18b, cogvlm2_19b, cogvlm_17b, glm4v_9b
from mllm.recipes.crome import crome_7b, crome_13b, crome_flan_t5_xxl
from mllm.recipes.eva import eva02_clip_l14, eva_clip_g14
from mllm.recipes.flamingo import (
    flamingo_3b,
    flamingo_9b,
    flamingo_80b,
    idefics_9b,
    openflamingo_3b,
    openflamingo_4b,
    openflamingo_9b,
    otter_9b,
)
from mllm.recipes.fromage import fromage
from mllm.recipes.gemini import mini_gemini_7b
from mllm.recipes.interleave import (
    llava_next_interleave_0_5b,
    llava_next_interleave_7b,
    llava_next_interleave_14b,
)
from mllm.recipes.internvl import internvl_10_13b, internvl_12_40b, internvl_15_26b, internvl_c, internvl_g
from mllm.recipes.llava import (
    llava_7b,
    llava_15_7b,
    llava_15_7b_lora,
    llava_15_13b,
    llava_next_7b,
    llava_next_13b,
    llava_next_34b,
    llava_next_llama3_8b,
    llava_next_mistral_7b,
    llava_next_qwen_72b,
    llava_next_qwen_110b,
    llava_next_video_7b,
    llava_next_video_7b_dpo,
)
from mllm.recipes.lwm import lwm_7b, lwm_text_7b, lwm_text_chat_7b
from mllm.recipes.lxmert import lxmert
from mllm.recipes.masked import beit_b16, mae_b16, mae_l16
from mllm.recipes.minicpm import llava_uhd_13b, minicpm_llama3_v_25, minicpm_v_20
from mllm.recipes.multiway import beit3_base, beit3_giant, beit3_large, vl_beit_base, vlmo_base, vlmo_large
from mllm.recipes.owl import kosmos_1, mplug_owl_7b, shikra_7b
from mllm.recipes.pixelbert import pixel_bert_r50, pixel_bert_x152
from mllm.recipes.qwen_vl import qwen_vl_7b
from mllm.recipes.real import vila_real
from mllm.recipes.siglip import siglip_b16, siglip_so400m
from mllm.recipes.smoke import vila_smoke
from mllm.recipes.supervised import (
    alexnet,
    lenet5,
    resnet50,
    resnet101,
    resnet152,
    vgg16,
    vgg19,
    vit_b16,
    vit_l16,
)
from mllm.recipes.uniter import uniter_base, uniter_large
from mllm.recipes.vila import vila_7b, vila_13b
from mllm.recipes.vila15 import vila_15_3b, vila_15_3b_s2, vila_15_8b, vila_15_13b, vila_15_40b
from mllm.recipes.vilt import vilt_b32
from mllm.recipes.vlbert import vl_bert_base, vl_bert_large

TOWERS_AND_SPLICE = (
    llava_7b,
    llava_15_7b,
    llava_15_13b,
    llava_15_7b_lora,
    llava_next_7b,
    llava_next_13b,
    llava_next_34b,
    llava_next_llama3_8b,
    llava_next_mistral_7b,
    llava_next_qwen_72b,
    llava_next_qwen_110b,
    llava_next_video_7b,
    llava_next_video_7b_dpo,
    llava_next_interleave_0_5b,
    llava_next_interleave_7b,
    llava_next_interleave_14b,
    vila_15_3b,
    vila_15_3b_s2,
    vila_15_8b,
    vila_15_13b,
    vila_15_40b,
    internvl_10_13b,
    internvl_12_40b,
    internvl_15_26b,
    minicpm_v_20,
    minicpm_llama3_v_25,
    llava_uhd_13b,
    minigpt4_7b,
    instructblip_7b,
    bliva_7b,
    mplug_owl_7b,
    shikra_7b,
    kosmos_1,
    mini_gemini_7b,
    qwen_vl_7b,
    glm4v_9b,
    blip2_opt_2_7b,
    blip2_opt_6_7b,
    blip2_flan_t5_xl,
)
"""Systems whose pictures stand in the sequence as tokens."""

FUSED = (
    flamingo_3b,
    flamingo_9b,
    flamingo_80b,
    openflamingo_3b,
    openflamingo_4b,
    openflamingo_9b,
    otter_9b,
    idefics_9b,
    llama_adapter_7b,
    cogvlm_17b,
    cogvlm2_19b,
    cogagent_18b,
    crome_7b,
    crome_13b,
    crome_flan_t5_xxl,
    cambrian_1_8b,
    cambrian_1_13b,
    cambrian_1_34b,
)
"""Systems that change how the language model meets pictures."""

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        *(vila_smoke, vila_real, vila_7b, vila_13b),
        *TOWERS_AND_SPLICE,
        *FUSED,
        *(clip_b32, clip_b16, clip_l14, openclip_h14, siglip_b16, siglip_so400m, eva_clip_g14, eva02_clip_l14),
        *(lenet5, alexnet, vgg16, vgg19, resnet50, resnet101, resnet152, vit_b16, vit_l16),
        *(mae_b16, mae_l16, beit_b16),
        *(vilt_b32, uniter_base, uniter_large, vl_bert_base, vl_bert_large, pixel_bert_r50, pixel_bert_x152, lxmert),
        *(vlmo_base, vlmo_large, vl_beit_base, beit3_base, beit3_large, beit3_giant),
        *(albef, blip_base, blip_large, coca_base, coca_large, blip2_stage1, internvl_c, internvl_g, fromage),
        *(lwm_text_7b, lwm_text_chat_7b, lwm_7b),
    )
}


def by_name(name: str) -> Recipe:
    """The recipe called `name`. Raises RecipeError with the nearest names."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 3)
        raise RecipeError(
            f"no recipe {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RECIPES)}")
        )
    return RECIPES[name]()
