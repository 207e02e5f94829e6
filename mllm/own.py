"""Towers that transformers has not: their weights are one file, `model.safetensors`, under the modules' own names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.types import spec

FILE = "model.safetensors"


class OwnTower(nn.Module):
    """A tower that keeps itself as towers of transformers do: `save_pretrained` writes what `read` reads."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights to `folder`, which is made if it is not there."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(state, Path(folder) / FILE)

    def read(self, folder: str) -> None:
        """Take the weights from `folder`. Raises ValueError where they are not there or of another shape."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise ValueError(
                f"weights {folder!r}: there is no {FILE}, which a {type(self).__name__} is read from; name a folder that has "
                "its weights under this project's names"
            )
        found, own = load_file(file), self.state_dict()
        wrong = [name for name in {**own, **found} if name not in own or name not in found]
        wrong += [name for name in own if name not in wrong and own[name].shape != found[name].shape]
        if wrong:
            raise ValueError(
                f"weights {folder!r} are of another {type(self).__name__} than the recipe's arch: {wrong[:3]} is missing or has "
                "another shape; mend the arch"
            )
        with torch.no_grad():
            self.load_state_dict(found)


@spec
class Blind:
    """A tower that sees nothing: a tile becomes one feature, zero. For models of text alone, and of pictures as codes (LWM)."""

    kind: Literal["blind"] = "blind"

    @property
    def width(self) -> int:
        return 1

    def tokens(self, tile: int, interpolate: bool = False) -> int:  # noqa: ARG002 -- whatever it is
        """Features of a tile: one."""
        return 1

    def tiny(self) -> Self:
        return self

    def build(self, weights: str | None, layer: int, cls: str = "drop", normed: bool = False) -> BlindTower:  # noqa: ARG002 -- as others
        return BlindTower()


class BlindTower(nn.Module):
    """`Blind`."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = OwnTower()

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 1 1"]:
        return pixels.new_zeros(len(pixels), 1, 1)

    def unused(self) -> list[nn.Module]:
        """None: there is nothing."""
        return []

    def units(self) -> list[nn.Module]:
        """None: there is nothing."""
        return []
