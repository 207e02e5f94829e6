"""A vision-language model from four parts: encode -> connect -> fuse -> decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mllm.connectors import Connector
from mllm.encoders import Encoder, Folder
from mllm.fusion import Fusion, Splice
from mllm.lm import CausalLM
from pipelines.tiling import Tiling
from pipelines.types import Batch, VisionLayout, spec


@spec
class VLM:
    """The model's axes as values. Building it needs no network when no part names weights."""

    kind: Literal["vlm"] = "vlm"
    encoder: Encoder
    connector: Connector
    lm: CausalLM
    fusion: Fusion = Splice()

    def layout(self, tiling: Tiling) -> VisionLayout:
        """The numbers that the pipeline needs. Raises ValueError when tiling and encoder do not fit."""
        if tiling.join != "tiles":
            raise ValueError(
                f"tiling {tiling.kind!r} needs features joined as {tiling.join!r}, and this model lays tiles one after the "
                "other; take resize, pad or dynamic_tiles"
            )
        patches = self.encoder.arch.tokens(tiling.size)
        tokens = self.fusion.positions(self.connector.tokens(patches))
        return VisionLayout(shape=tiling.shape, tokens_per_tile=tokens)

    def build(self, folder: Folder = str) -> VisionLanguageModel:
        """The module, float32, on the current default device; `folder` finds the weights that the parts name."""
        return VisionLanguageModel(self, folder)

    def meta(self) -> VisionLanguageModel:
        """The module without memory: shapes alone, nothing is read."""
        with torch.device("meta"):
            return self.bare().build()

    def empty(self) -> VisionLanguageModel:
        """The module in memory that nobody has written to, for weights that come from elsewhere. Nothing is read."""
        model = self.meta().to_empty(device="cpu")
        model.lm.model.tie_weights()  # which memory of their own has parted
        return model

    def bare(self) -> VLM:
        """The same without what must be read: no weights, no tokenizer."""
        lm = replace(self.lm, weights=None, tokenizer=self.lm.text_codec)
        return replace(self, encoder=replace(self.encoder, weights=None), lm=lm)


class VisionLanguageModel(nn.Module):
    """`model(batch)` -> hidden states float (T, D); the objective turns them into a loss."""

    def __init__(self, spec: VLM, folder: Folder) -> None:
        super().__init__()
        self.encoder = spec.encoder.build(folder)
        self.lm = spec.lm.build(folder)
        seen = spec.encoder.arch.width
        width = spec.fusion.width(seen, self.lm.width)
        self.connector = spec.connector.build(seen, width)
        self.fusion = spec.fusion.build(spec.lm, width)
        self.fusion.attach(self.lm)
        self.border = nn.Flatten(0, 1)  # a module, so that whoever measures can hook on where vision ends

    def forward(self, batch: Batch) -> Float[Tensor, "T D"]:
        visual = self.border(self.connector(self._features(batch)))
        return self.fusion(self.lm, self.lm.embed(batch.input_ids), visual, batch)

    def _features(self, batch: Batch) -> Float[Tensor, "N P Dv"]:
        """The encoder's features: computed here, or by an annotator in the pipeline, where it is frozen."""
        if batch.features is None:
            return self.encoder(batch.tiles)
        return batch.features.to(next(self.connector.parameters()).dtype)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that `Stage.tune` uses, from the coarse to the exact.

        `encoder` leaves out the layers above the one that is read: nothing could ever train them.
        """
        idle = {id(p) for module in self.encoder.tower.unused() for p in module.parameters()}
        fusion = self.fusion.parts(self.lm)
        attached = {id(p) for p in fusion.get("fusion", [])}

        def own(module: nn.Module) -> list[nn.Parameter]:
            return [p for p in module.parameters() if id(p) not in attached]

        return {
            "encoder": [p for p in self.encoder.parameters() if id(p) not in idle],
            "connector": list(self.connector.parameters()),
            **fusion,
            "lm": own(self.lm),
            "lm.embeddings": own(self.lm.embedding),
            "lm.layers": own(self.lm.layers),
            "lm.head": own(self.lm.model.lm_head),
        }

    def units(self) -> list[nn.Module]:
        """Modules to be sharded (and recomputed) one by one."""
        return [*self.encoder.tower.units(), self.connector, *self.fusion.units(), *self.lm.units()]
