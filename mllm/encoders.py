"""Visual encoders: tiles -> patch features, through `transformers` towers.

An `Encoder` says which tower (`arch`, its shape, known without a download), whose weights, and how it is read; `Encoders` are
several that look at the same tile. To add a tower: an architecture with `tokens`, `width`, `build` and `tiny`, its name in
`VisionArch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from mllm.blipvision import BlipVision
from mllm.convnets import ConvNeXt, ConvTower, MobileNetV2, ResNet
from mllm.depth import Depth, DropPath
from mllm.eva02 import Eva02
from mllm.nfnet import NFNet
from mllm.own import Blind, BlindTower
from mllm.towers import ClipVision, Cls, Dinov2, EvaClip, Grid, InternViT, SiglipVision, ViT, ViTTower
from ops.images import normalize
from pipelines.types import spec

__all__ = [
    "Blind",
    "BlipVision",
    "ClipVision",
    "ConvNeXt",
    "Dinov2",
    "Encoder",
    "Encoders",
    "Eva02",
    "EvaClip",
    "Folder",
    "InternViT",
    "MobileNetV2",
    "NFNet",
    "ResNet",
    "SiglipVision",
    "ViT",
    "VisionArch",
    "VisionEncoder",
    "VisionEncoders",
]

Folder = Callable[[str], str]
"""From a name of weights to the folder or hub id that the site keeps them under."""

VisionArch = Annotated[
    ClipVision
    | BlipVision
    | SiglipVision
    | Dinov2
    | InternViT
    | EvaClip
    | Eva02
    | ViT
    | ConvNeXt
    | NFNet
    | ResNet
    | MobileNetV2
    | Blind,
    Field(discriminator="kind"),
]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@spec
class Encoder:
    """A tower and how it is read. `weights` None trains it from scratch; `layer` counts as in LLaVA: -2 is the last but one.

    `normed` applies the tower's final norm to what is read, and `cls` says whether the first feature is its CLS token.
    `interpolate` stretches learned positions, bicubic, to tiles of another size than the tower was made for. `drop_path` is
    the share of branches left out in the last layer while the tower is trained. `mean` and `std` normalise RGB in [0, 1].
    """

    arch: VisionArch
    weights: str | None = None
    layer: int = -2
    cls: Cls = "drop"
    normed: bool = False
    interpolate: bool = False
    drop_path: DropPath = 0.0
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD

    def __post_init__(self) -> None:
        if self.cls == "keep" and isinstance(self.arch, SiglipVision | ConvNeXt | ResNet | MobileNetV2):
            raise ValueError(f"encoder.cls='keep': {self.arch.kind!r} has no CLS token; take 'drop'")
        layers = getattr(self.arch, "layers", None)  # of transformers
        if layers is not None and not -layers - 1 <= self.layer <= layers:
            raise ValueError(
                f"encoder.layer={self.layer}: the tower has {layers} layers; take one of {-layers - 1} to -1"
            )

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self.arch.width

    @property
    def towers(self) -> tuple[Encoder, ...]:
        return (self,)

    def tokens(self, tile: int) -> int:
        """Features of a tile `tile` pixels a side. Raises ValueError when the tower does not take that size."""
        return self.arch.tokens(tile, self.interpolate) + (self.cls == "keep")

    def bare(self) -> Encoder:
        """Without weights to be read."""
        return replace(self, weights=None)

    def tiny(self) -> Encoder:
        """The same structure at a size for tests, from scratch."""
        arch = self.arch.tiny()
        layer = max(self.layer, -2) if self.layer < 0 else min(self.layer, 2)
        return replace(self, arch=arch, weights=None, layer=layer)

    def build(self, folder: Folder) -> VisionEncoder:
        place = folder(self.weights) if self.weights else None
        return VisionEncoder(self, self.arch.build(place, self.layer, self.cls, self.normed))


@spec
class Encoders:
    """Several towers on the same tiles, each at its own size (Cambrian-1, arXiv:2406.16860, 3.2; Mini-Gemini).

    `sizes` are the pixels a side that each tower sees: a tile is resized to them on its device, so cut tiles as large as the
    largest. The first tower is the one whose grid others are looked at from.
    """

    towers: tuple[Encoder, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.towers) < 2 or len(self.towers) != len(self.sizes):
            raise ValueError(
                f"{len(self.towers)} towers and {len(self.sizes)} sizes; give two towers or more, and each its size"
            )
        for tower, size in zip(self.towers, self.sizes, strict=True):
            tower.tokens(size)  # each must take its size

    @property
    def width(self) -> tuple[int, ...]:
        """Channels of each tower's features."""
        return tuple(tower.width for tower in self.towers)

    def tokens(self, tile: int) -> tuple[int, ...]:
        """Features of each tower. Raises ValueError when the tile is smaller than what the towers look at."""
        if tile < max(self.sizes):
            raise ValueError(
                f"tiling cuts tiles of {tile} pixels and a tower looks at {max(self.sizes)}; set the tiling's size to "
                f"{max(self.sizes)}"
            )
        return tuple(tower.tokens(size) for tower, size in zip(self.towers, self.sizes, strict=True))

    def bare(self) -> Encoders:
        """Without weights to be read."""
        return replace(self, towers=tuple(tower.bare() for tower in self.towers))

    def tiny(self) -> Encoders:
        """The same structure at a size for tests, from scratch."""
        towers = tuple(tower.tiny() for tower in self.towers)
        return Encoders(towers=towers, sizes=tuple(getattr(tower.arch, "image", 64) for tower in towers))

    def build(self, folder: Folder) -> VisionEncoders:
        return VisionEncoders([tower.build(folder) for tower in self.towers], self.sizes)


class VisionEncoder(nn.Module):
    """uint8 tiles -> features: normalises on the tiles' own device, then runs the tower."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: Encoder, tower: ViTTower | ConvTower | BlindTower) -> None:
        super().__init__()
        self.tower = tower
        self.depth: Depth | None = None
        if spec.drop_path:
            if not isinstance(tower, ViTTower):
                raise ValueError(
                    f"encoder.drop_path={spec.drop_path}: {spec.arch.kind} has no branches to leave out; set it to 0"
                )
            self.depth = Depth(tower.branches(), spec.drop_path)
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    def forward(
        self, tiles: UInt8[Tensor, "N ..."], grids: Sequence[Grid] | None = None, seeds: Int[Tensor, " N"] | None = None
    ) -> Float[Tensor, "N P D"]:
        """Patch features in row-major order; CLS first, where it is kept.

        With `grids`, rows and columns of slices, `tiles` are their patches one after the other, channels first inside, and each
        slice's features are filled up to the longest. Raises ValueError where the tower reads whole tiles alone. `seeds` of tiles
        say which branches are left out, if the tower is trained and leaves any.
        """
        if self.depth is not None:
            self.depth.draw(seeds if self.trained else None)
        if grids is not None:
            return self._slices(tiles, grids)
        return self._run(lambda: self.tower(self._normalised(tiles)))

    def _slices(self, patches: UInt8[Tensor, "R C"], grids: Sequence[Grid]) -> Float[Tensor, "N P D"]:
        if not isinstance(self.tower, ViTTower):
            raise ValueError(f"{type(self.tower).__name__} reads whole tiles, no slices of several shapes")
        tower, lengths = self.tower, [rows * cols for rows, cols in grids]
        pixels = self._normalised(patches.unflatten(1, (3, -1)).unsqueeze(-1)).flatten(1)
        pieces = pixels[: sum(lengths)].split(lengths)
        filled = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        return self._run(lambda: tower.slices(filled, grids))

    def _normalised(self, tiles: Tensor) -> Tensor:
        return normalize(tiles, self.mean, self.std).to(next(self.tower.parameters(), self.mean).dtype)

    @property
    def trained(self) -> bool:
        """Whether any of its weights is."""
        return any(p.requires_grad for p in self.tower.parameters())

    @property
    def drops(self) -> bool:
        """Whether it asks for seeds: it is being trained, and leaves branches out."""
        return self.depth is not None and self.training and self.trained

    def _run(self, read: Callable[[], Tensor]) -> Tensor:
        if self.trained:
            return read()
        with torch.no_grad():  # a frozen tower keeps no activations
            return read()

    def units(self) -> list[nn.Module]:
        return self.tower.units()

    def unused(self) -> list[nn.Module]:
        return self.tower.unused()


class VisionEncoders(nn.Module):
    """uint8 tiles -> each tower's features, every tower at its own size."""

    def __init__(self, encoders: list[VisionEncoder], sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.sizes = sizes

    @property
    def each(self) -> list[VisionEncoder]:
        return [one for one in self.encoders if isinstance(one, VisionEncoder)]

    @property
    def drops(self) -> bool:
        """Whether one of them asks for seeds."""
        return any(one.drops for one in self.each)

    def forward(
        self, tiles: UInt8[Tensor, "N 3 H W"], seeds: Int[Tensor, " N"] | None = None
    ) -> tuple[Float[Tensor, "N _ _"], ...]:
        """Features of each tower, (N, P, D) with P and D its own."""
        return tuple(
            encoder(_resized(tiles, size), seeds=seeds) for encoder, size in zip(self.encoders, self.sizes, strict=True)
        )

    def units(self) -> list[nn.Module]:
        return [unit for encoder in self.each for unit in encoder.units()]

    def unused(self) -> list[nn.Module]:
        return [module for encoder in self.each for module in encoder.unused()]


def _resized(tiles: UInt8[Tensor, "N 3 H W"], size: int) -> UInt8[Tensor, "N 3 h w"]:
    """Tiles of `size` pixels a side, bicubic, smoothed where they shrink."""
    if tiles.shape[-1] == size:
        return tiles
    pixels = F.interpolate(tiles.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return pixels.round().clamp(0, 255).to(torch.uint8)
