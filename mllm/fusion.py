"""Fusion: how visual tokens enter the language model. To add one: a spec with `merge` (or a module), its name in `Fusion`."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from pipelines.types import spec


@spec
class Splice:
    """Visual tokens stand in the sequence where the image stood (LLaVA and most since)."""

    kind: Literal["splice"] = "splice"

    def merge(
        self, text: Float[Tensor, "T D"], visual: Float[Tensor, "V D"], at: Bool[Tensor, " T"], count: int
    ) -> Float[Tensor, "T D"]:
        """`text` with the rows marked by `at` replaced, in order, by `visual`; `count` is how many are marked.

        Without images the one blank tile's features enter times zero: the modules run on every rank, and change nothing.
        Raises ValueError when features and places do not match, since scattering anyway would misplace every later image.
        """
        if count == 0:
            return text + 0 * visual.sum()
        if count != len(visual):
            raise ValueError(
                f"the pack has {count} image positions and the encoder gave {len(visual)} visual tokens; "
                "the pipeline was planned with another model: its VisionLayout must come from this model's layout()"
            )
        return text.masked_scatter(at.unsqueeze(1), visual.to(text.dtype))


Fusion = Splice
