"""Classifiers of pictures: one picture -> scores of its classes, supervised by `Document.label`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from mllm import cnn
from mllm.chance import tile_seeds
from mllm.depth import Depth, DropPath, branches_of
from mllm.encoders import Folder
from mllm.layers import TOY, Layers, Patched
from mllm.model import IMAGENET_MEAN, IMAGENET_STD, RGB, Model, PictureModel
from mllm.pairs import first_pictures
from mllm.weights import TOWER_FIELDS, agree, load
from ops.images import normalize
from pipelines.types import Batch, spec


@spec
class ViT(Patched):
    """ViT (arXiv:2010.11929): patches, learned positions, read at its CLS token.

    `drop_path` is the share of branches left out in the last layer (DeiT, arXiv:2012.12877, table 9).
    """

    kind: Literal["vit"] = "vit"
    shape: Layers
    patch: int = 16
    drop_path: DropPath = 0.0

    def tiny(self) -> Self:
        return replace(self, shape=TOY, patch=16, image=32)

    def build(self, classes: int, weights: str | None) -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        words: dict[str, Any] = {**self.shape.words(), "num_labels": classes}
        config = ViTConfig(**words, **self.sizes())
        base, auto = ViTForImageClassification, "AutoModelForImageClassification"
        if weights is None:
            return base._from_config(config, attn_implementation="sdpa")
        net = load(base, auto, weights, num_labels=classes, attn_implementation="sdpa", dtype=torch.float32)
        agree(weights, config, net.config, TOWER_FIELDS)
        return net


@spec
class ResNet:
    """ResNet (arXiv:1512.03385) with the stride in the 3 x 3 convolution, as `transformers` and torchvision have it.

    Statistics of a batch would tie a picture to its neighbours. So `norm` is "group", normalising each picture by itself with as
    many weights (arXiv:1803.08494), or "batch" with the statistics that loaded weights bring, which stay as they are.
    """

    kind: Literal["resnet"] = "resnet"
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    stem: int = 64
    widths: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    image: int = 224
    norm: cnn.NormKind = "group"

    @property
    def cells(self) -> int:
        return (self.image // 32) ** 2

    def tiny(self) -> Self:
        return replace(self, depths=(1, 1, 1, 1), stem=8, widths=(16, 16, 32, 32), image=64)

    def build(self, classes: int, weights: str | None) -> Any:
        from transformers import ResNetConfig, ResNetForImageClassification

        sizes: dict[str, Any] = {"hidden_sizes": list(self.widths), "depths": list(self.depths), "num_labels": classes}
        config = ResNetConfig(embedding_size=self.stem, **sizes)
        base, auto = ResNetForImageClassification, "AutoModelForImageClassification"
        if weights is None:
            net = base(config)
        else:
            net = load(base, auto, weights, num_labels=classes, dtype=torch.float32)
            agree(weights, config, net.config, ("hidden_sizes", "depths"))
        if self.norm == "group":
            cnn.group_norms(net)
        return net


@spec
class LeNet5:
    """See `cnn.LeNet`."""

    kind: Literal["lenet5"] = "lenet5"

    @property
    def image(self) -> int:
        return 32

    @property
    def cells(self) -> int:
        return 25

    def tiny(self) -> Self:
        return self

    def build(self, classes: int, weights: str | None) -> nn.Module:
        _none(weights, "LeNet-5")
        return cnn.LeNet(classes)


@spec
class AlexNet:
    """See `cnn.AlexNet`; `width` of its first convolution, 96."""

    kind: Literal["alexnet"] = "alexnet"
    width: int = 96

    @property
    def image(self) -> int:
        return 227

    @property
    def cells(self) -> int:
        return 36

    def tiny(self) -> Self:
        return replace(self, width=6)

    def build(self, classes: int, weights: str | None) -> nn.Module:
        _none(weights, "AlexNet")
        return cnn.AlexNet(classes, self.width)


@spec
class VGGNet:
    """See `cnn.VGG`; `depths` (2, 2, 3, 3, 3) are VGG-16's."""

    kind: Literal["vgg"] = "vgg"
    depths: tuple[int, int, int, int, int] = (2, 2, 3, 3, 3)
    width: int = 64
    image: int = 224

    @property
    def cells(self) -> int:
        return (self.image // 32) ** 2

    def tiny(self) -> Self:
        return replace(self, width=4, image=32)

    def build(self, classes: int, weights: str | None) -> nn.Module:
        _none(weights, "VGG")
        return cnn.VGG(classes, self.depths, self.width, self.image // 32)


def _none(weights: str | None, what: str) -> None:
    if weights is not None:
        raise ValueError(
            f"{what} is trained from scratch here, and weights={weights!r} cannot be read; leave them away"
        )


Backbone = Annotated[ViT | ResNet | LeNet5 | AlexNet | VGGNet, Field(discriminator="kind")]


@spec
class Classifier(PictureModel):
    """A network with `classes` scores."""

    kind: Literal["classifier"] = "classifier"
    arch: Backbone
    classes: int = 1000
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD

    @property
    def learns(self) -> tuple[str, ...]:
        return ("classification",)

    def tiny(self) -> Self:
        return replace(self, arch=self.arch.tiny(), weights=None)

    def build(self, folder: Folder = str) -> ImageClassifier:
        return ImageClassifier(self, folder)


@dataclass(slots=True)
class Scores:
    """Scores of pictures float (I, C), and the document int64 (I,) that each is the first picture of."""

    logits: Float[Tensor, "I C"]
    documents: Int[Tensor, " I"]


class ImageClassifier(Model):
    """`scores(batch)`: those of each document's first picture; `model(batch)` gives the numbers alone, (I, C)."""

    net: Any
    mean: Tensor
    std: Tensor

    def __init__(self, spec: Classifier, folder: Folder) -> None:
        super().__init__()
        self.net = spec.arch.build(spec.classes, folder(spec.weights) if spec.weights else None)
        self.still = isinstance(spec.arch, ResNet) and spec.arch.norm == "batch"
        self.kind = spec.arch.kind
        rate = spec.arch.drop_path if isinstance(spec.arch, ViT) else 0.0
        self.depth = Depth([branches_of(layer) for layer in self.net.vit.layers], rate) if rate else None
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    def train(self, mode: bool = True) -> ImageClassifier:
        """As ever, but that statistics of batches stay as they were loaded."""
        return super().train(mode and not self.still)

    def forward(self, batch: Batch) -> Float[Tensor, "I C"]:
        return self.scores(batch).logits

    def scored(self, batch: Batch) -> Int[Tensor, " I"]:
        """The documents that `scores` are of."""
        return first_pictures(batch).documents

    def scores(self, batch: Batch) -> Scores:
        pixels = normalize(batch.tiles, self.mean, self.std).to(next(self.net.parameters()).dtype)
        if self.depth is not None:
            self.depth.draw(tile_seeds(batch))
        output = self.net(pixels)
        pictures = first_pictures(batch)
        return Scores((output if isinstance(output, Tensor) else output.logits)[pictures.tiles], pictures.documents)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        head = list(
            (self.net.layers if self.kind in ("lenet5", "alexnet", "vgg") else self.net.classifier).parameters()
        )
        inside = {id(p) for p in head}
        return {"vision": [p for p in self.net.parameters() if id(p) not in inside], "head": head}

    def units(self) -> list[nn.Module]:
        match self.kind:
            case "vit":
                return list(self.net.vit.layers)
            case "resnet":
                return [layer for stage in self.net.resnet.encoder.stages for layer in stage.layers]
            case _:
                return []
