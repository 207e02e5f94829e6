"""What the rest of the system asks of a model, whatever its kind: a spec of a recipe, and the module that it builds.

To add a kind: a `@spec` that is a `ModelSpec`, its module that is a `Model`, and its name in `recipe.ModelKind`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mllm.encoders import Folder
from ops.attention import Backend
from pipelines.chat import ChatML, Template
from pipelines.tiling import Tiling
from pipelines.types import Batch, VisionLayout, spec


@spec
class Words:
    """How text becomes tokens for a model. `tokenizer` is the name of a folder, None for a model that reads no text.

    `vocabulary` is the number of its tokens; `longest` the positions that a document may have, None where the model itself cuts
    what is too long.
    """

    tokenizer: str | None = None
    chat: Template = ChatML()
    bos: str | None = None
    eos: str | None = None
    vocabulary: int = 0
    longest: int | None = None


class ModelSpec:
    """A model as a value: the recipe's word for it. Building it needs no network where no part names weights."""

    __slots__ = ()

    @property
    def words(self) -> Words:
        """The text side, for the pipeline."""
        return Words()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the weights that building it loads."""
        return ()

    @property
    def learns(self) -> tuple[str, ...]:
        """Kinds of the objectives that can train it."""
        raise NotImplementedError

    @property
    def heads(self) -> tuple[int, int] | None:
        """Heads and key-value heads of the attention whose positions ranks could share; None where they cannot share packs."""
        return None

    def layout(self, tiling: Tiling) -> VisionLayout:
        """The numbers that the pipeline needs. Raises ValueError when tiling and model do not fit."""
        raise NotImplementedError

    def build(self, folder: Folder = str) -> Model:
        """The module, float32, on the current default device; `folder` finds the weights that the parts name."""
        raise NotImplementedError

    @property
    def side(self) -> int:
        """Side of the pictures it takes, in pixels. Raises ValueError for a model that takes any."""
        raise ValueError(f"{type(self).__name__} takes pictures of any side; set the tiling's size")

    def tiny(self) -> Self:
        """The same structure at a size that a test builds and trains in no time, with the example tokenizer."""
        raise NotImplementedError

    def bare(self) -> Self:
        """The same without what must be read: no weights."""
        return self

    def meta(self) -> Model:
        """The module without memory: shapes alone, nothing is read."""
        with torch.device("meta"):
            return self.bare().build()

    def empty(self) -> Model:
        """The module in memory, float32, for weights that come from elsewhere: none are read, drawn or written, and memory that
        nobody writes to costs none. Buffers are as built, and what is tied is one tensor.
        """
        with _Unwritten():
            return self.bare().build()


FILLS = {"normal_", "uniform_", "fill_", "zero_", "copy_", "erfinv_", "mul_", "add_", "div_", "clamp_"}
"""What is done to parameters that are drawn, or copied from others."""


class _Unwritten(TorchFunctionMode):
    """Within, parameters are made and never filled."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")  # as `torch.nn.init` calls it
        fills = getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in FILLS
        return first if fills and isinstance(first, nn.Parameter) else func(*args, **kwargs)


RGB = tuple[float, float, float]
"""Red, green, blue, each in [0, 1]."""

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
HALF: RGB = (0.5, 0.5, 0.5)


@spec
class PictureModel(ModelSpec):
    """A model that takes whole pictures, as large as its `arch` says; `mean` and `std` normalise RGB in [0, 1].

    `weights` None trains it from scratch.
    """

    arch: Any
    weights: str | None = None
    mean: RGB
    std: RGB

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.weights,) if self.weights else ()

    @property
    def side(self) -> int:
        return self.arch.image

    def layout(self, tiling: Tiling) -> VisionLayout:
        check_tiles(tiling, self.arch.image, f"the {self.arch.kind}")
        return VisionLayout(shape=tiling.shape, tokens_per_tile=self.arch.cells)

    def bare(self) -> Self:
        return replace(self, weights=None)


class Model(nn.Module):
    """A module that takes packs. Objectives know more of each kind; engines, checkpoints and the plan know this.

    A module `border`, where there is one, has for output what ends the vision of a forward pass: whoever measures hooks on it.
    """

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that `Stage.tune` uses, from the coarse to the exact."""
        raise NotImplementedError

    def main(self) -> dict[str, list[nn.Parameter]]:
        """The coarse parts, which hold every parameter between them: the lines of the table of what is trained."""
        return {name: parameters for name, parameters in self.parts().items() if "." not in name}

    def units(self) -> list[nn.Module]:
        """Modules to be sharded (and recomputed) one by one; each is called as a module, and gives no view of its input."""
        raise NotImplementedError

    def stepped(self) -> None:
        """Called on every rank once a step has been taken: for what follows the weights without being trained."""

    def attend_by(self, backend: Backend | None) -> None:
        """Ask for a backend of the attention over documents; None for the best that there is."""

    def next_logits(self, batch: Batch) -> Tensor:  # noqa: ARG002 -- as those do that can
        """Logits of the token after each document, float (S, C). Raises ValueError for a model that writes no text."""
        raise ValueError(
            f"{type(self).__name__} writes no text, so there is no next token; ask a model with a language model"
        )


def check_tiles(tiling: Tiling, side: int, what: str) -> None:
    """Raise ValueError unless `tiling` cuts each picture into single tiles of `side` pixels, as `what` takes them."""
    if tiling.join != "tiles" or tiling.size != side:
        raise ValueError(
            f"tiling {tiling.kind!r} cuts tiles of {tiling.size} pixels joined as {tiling.join!r}, and {what} takes whole "
            f"pictures of {side}; take resize or pad with size={side}"
        )


def check_mask(mask: int, vocabulary: int) -> None:
    """Raise ValueError unless `mask` is one of the words of a vocabulary."""
    if mask >= vocabulary:
        raise ValueError(f"mask={mask} is none of the {vocabulary} words of the vocabulary; mend one")
