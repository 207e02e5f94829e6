"""BLIP's vision transformer, whose layers are named otherwise than other towers'."""

from __future__ import annotations

from typing import Any, Literal

import torch

from mllm.towers import Cls, EvaTower, ViTShape, ViTTower
from mllm.weights import agree, load
from pipelines.types import spec


@spec
class BlipVision(ViTShape):
    """The vision transformer of BLIP (arXiv:2201.12086), ViT-B/16 or L/16: learned positions, CLS first."""

    kind: Literal["blip_vision"] = "blip_vision"
    intermediate_size: int
    patch: int = 16
    image: int = 224

    def config(self) -> Any:
        from transformers import BlipVisionConfig

        return BlipVisionConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            patch_size=self.patch,
            image_size=self.image,
            initializer_range=0.02,  # transformers' own default is as good as zero
        )

    def build(self, weights: str | None, layer: int, cls: Cls = "drop", normed: bool = False) -> ViTTower:
        from transformers import BlipVisionModel

        if weights is None:  # its attention is transformers' plain one, the only one that this class has
            tower = BlipVisionModel._from_config(self.config(), attn_implementation="eager")
        else:
            tower = load(BlipVisionModel, "AutoModel", weights, attn_implementation="eager", dtype=torch.float32)
            agree(
                weights, self.config(), tower.config, ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
            )
        return EvaTower(tower, layer, cls, normed)
