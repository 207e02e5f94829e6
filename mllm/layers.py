"""Words that shapes of models have in common."""

from __future__ import annotations

from typing import Any

from pipelines.types import spec


@spec
class Layers:
    """The shape of one tower's transformer."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int

    def words(self) -> dict[str, Any]:
        """What transformers' configurations call them."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
        }


TOY = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
"""For tests."""


@spec
class Patched:
    """A model of pictures `image` pixels a side, cut in patches of `patch` pixels."""

    patch: int
    image: int = 224

    @property
    def cells(self) -> int:
        """Patches of a picture."""
        return (self.image // self.patch) ** 2

    def sizes(self) -> dict[str, Any]:
        """What transformers' configurations call them."""
        return {"patch_size": self.patch, "image_size": self.image}
