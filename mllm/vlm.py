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
from mllm.model import Model, ModelSpec, Words
from ops.attention import Backend
from pipelines.tiling import Tiling
from pipelines.types import Batch, VisionLayout, spec


@spec
class VLM(ModelSpec):
    """The model's axes as values. Building it needs no network when no part names weights."""

    kind: Literal["vlm"] = "vlm"
    encoder: Encoder
    connector: Connector
    lm: CausalLM
    fusion: Fusion = Splice()

    @property
    def words(self) -> Words:
        lm = self.lm
        return Words(
            tokenizer=lm.text_codec,
            chat=lm.chat,
            bos=lm.bos,
            eos=lm.eos,
            vocabulary=lm.arch.vocab_size,
            longest=lm.arch.context,
        )

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for name in (self.encoder.weights, self.lm.weights) if name)

    @property
    def learns(self) -> tuple[str, ...]:
        return ("next_token", "dpo")

    @property
    def heads(self) -> tuple[int, int]:
        return self.lm.arch.heads, self.lm.arch.kv_heads

    def layout(self, tiling: Tiling) -> VisionLayout:
        """The numbers that the pipeline needs. Raises ValueError when tiling and encoder do not fit."""
        if tiling.join != "tiles":
            raise ValueError(
                f"tiling {tiling.kind!r} needs features joined as {tiling.join!r}, and this model lays tiles one after the "
                "other; take resize, pad or dynamic_tiles"
            )
        patches = self.encoder.arch.tokens(tiling.size)
        return VisionLayout(shape=tiling.shape, tokens_per_tile=self.connector.tokens(patches))

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


class VisionLanguageModel(Model):
    """`model(batch)` -> hidden states float (T, D); the objective turns them into a loss."""

    def __init__(self, spec: VLM, folder: Folder) -> None:
        super().__init__()
        self.encoder = spec.encoder.build(folder)
        self.lm = spec.lm.build(folder)
        self.connector = spec.connector.build(spec.encoder.arch.width, self.lm.width)
        self.fusion = spec.fusion
        self.border = nn.Flatten(0, 1)  # a module, so that whoever measures can hook on where vision ends

    def forward(self, batch: Batch) -> Float[Tensor, "T D"]:
        visual = self.border(self.connector(self._features(batch)))
        if batch.share is not None:  # each rank has seen some of the tiles, and has positions for others
            visual = batch.share.context.gather(visual)[batch.share.visual]
        text = self.lm.embed(batch.input_ids)
        fused = self.fusion.merge(text, visual, batch.visual, batch.visual_count)
        return self.lm(fused, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.share)

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
        model = self.lm.model
        return {
            "encoder": [p for p in self.encoder.parameters() if id(p) not in idle],
            "connector": list(self.connector.parameters()),
            "lm": list(self.lm.parameters()),
            "lm.embeddings": list(model.model.embed_tokens.parameters()),
            "lm.layers": list(model.model.layers.parameters()),
            "lm.head": list(model.lm_head.parameters()),
        }

    def main(self) -> dict[str, list[nn.Parameter]]:
        known = {"encoder": self.encoder, "connector": self.connector, "lm": self.lm}
        return {
            name: list(part.parameters())
            for name, part in (known | dict(self.named_children())).items()
            if name != "border"
        }

    def attend_by(self, backend: Backend | None) -> None:
        self.lm.backend = backend

    def next_logits(self, batch: Batch) -> Float[Tensor, "S C"]:
        last = self(batch)[batch.cu_seqlens[1:].long() - 1]
        return last @ self.lm.head.to(last.dtype).T

    def units(self) -> list[nn.Module]:
        """Modules to be sharded (and recomputed) one by one."""
        return [*self.encoder.tower.units(), self.connector, *self.lm.units()]
