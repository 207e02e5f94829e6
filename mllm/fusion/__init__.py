"""Fusion: how visual tokens meet the language model.

A spec says how wide the visual tokens must be (`width`), how many positions of the sequence a tile takes (`positions`),
whether it must tell pictures and their tiles apart (`sees_pictures`), whether ranks may share a pack under it (`shares`), after
how many layers its pattern repeats (`period`), and `build`s a module:

    fusion.attach(lm)                              once, for what lives inside the language model's layers
    fusion(lm, text, visual, batch) -> hidden      (T, D), (V, width) and the pack; calls the language model itself
    fusion.parts(lm), fusion.units()               what can be tuned by name, and what is sharded one by one

Two of them look beside the visual tokens, at what the towers made: `InLMSampler` at the cells of an `sva`, `SideAttention` at the
features of a second tower. Their `build` is told that shape, and they are called with it as a fifth argument.

To add one: such a spec and module, and its name in `Fusion`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm.fusion.adapter import PreLMAdapter
from mllm.fusion.cross import CrossAttention
from mllm.fusion.experts import RoutedExperts
from mllm.fusion.prompts import PromptAdapter
from mllm.fusion.sampler import InLMSampler
from mllm.fusion.side import SideAttention
from mllm.fusion.splice import Splice
from mllm.fusion.unified import UnifiedVocabulary

Fusion = Annotated[
    Splice
    | CrossAttention
    | PreLMAdapter
    | RoutedExperts
    | PromptAdapter
    | UnifiedVocabulary
    | InLMSampler
    | SideAttention,
    Field(discriminator="kind"),
]

__all__ = [
    "CrossAttention",
    "Fusion",
    "InLMSampler",
    "PreLMAdapter",
    "PromptAdapter",
    "RoutedExperts",
    "SideAttention",
    "Splice",
    "UnifiedVocabulary",
]
