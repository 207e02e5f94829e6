"""Classifiers of ImageNet: LeNet-5, AlexNet, VGG, ResNet and ViT, trained from scratch on pictures with a class.

Deviations, all of them from one rule, that a picture's result depends neither on its neighbours nor on chance: no dropout,
ResNets normalise over groups of channels in the place of the batch (GroupNorm, arXiv:1803.08494), pictures are the middle square.
AdamW steps where the papers have SGD with momentum 0.9, so rates are not theirs but usual ones for it.
"""

from mllm.classify import AlexNet, Backbone, Classifier, LeNet5, ResNet, VGGNet, ViT
from mllm.dual import Layers
from mllm.objectives import Classification
from mllm.recipe import AdamW, Cosine, Epochs, Recipe, Source, Stage
from mllm.recipes.shared import decayed
from pipelines.corpora import Labelled
from pipelines.tiling import Resize

IMAGENET = 1_281_167

VGG, RESNET, VIT = "arXiv:1409.1556", "arXiv:1512.03385", "arXiv:2010.11929"

B16 = Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072)
L16 = Layers(hidden_size=1024, layers=24, heads=16, intermediate_size=4096)


def _recipe(
    name: str,
    paper: str,
    arch: Backbone,
    lr: float,
    weight_decay: float,
    pictures: int,
    epochs: float,
    warmup: float = 0.05,
    corpus: str = "imagenet-1k",
    classes: int = 1000,
    free: tuple[str, ...] = ("*.bias", "*norm*.weight"),
) -> Recipe:
    a_pack = min(64, pictures)
    stage = Stage(
        name="supervised",
        mixture=(Source(corpus=Labelled(name=corpus)),),
        tune=decayed(("vision", "head"), lr, weight_decay, free),
        context=a_pack * arch.cells + 1,
        max_tiles=a_pack,
        tokens_per_step=pictures // a_pack * (a_pack * arch.cells + 1),
        duration=Epochs(count=epochs),
        objective=Classification(),
        optimizer=AdamW(),
        schedule=Cosine(warmup=warmup),
    )
    return Recipe(
        name=name,
        paper=paper,
        model=Classifier(arch=arch, classes=classes),
        tiling=Resize(size=arch.image),
        stages=(stage,),
    )


def lenet5() -> Recipe:
    """LeNet-5 on handwritten digits."""
    paper = "Proceedings of the IEEE 86(11), 1998"
    return _recipe("lenet5", paper, LeNet5(), 1e-3, 0.0, 128, 20, corpus="mnist", classes=10, free=("*.bias",))


def alexnet() -> Recipe:
    """AlexNet: 128 pictures a step for 90 epochs, decay 5e-4."""
    return _recipe("alexnet", "NeurIPS 2012", AlexNet(), 1e-4, 5e-4, 128, 90, free=("*.bias",))  # not certain: the rate


def vgg16() -> Recipe:
    """VGG-16: 256 pictures a step for 74 epochs, decay 5e-4."""
    return _recipe("vgg16", VGG, VGGNet(), 1e-4, 5e-4, 256, 74, free=("*.bias",))  # not certain: the rate


def vgg19() -> Recipe:
    """VGG-19."""
    return _recipe(
        "vgg19", VGG, VGGNet(depths=(2, 2, 4, 4, 4)), 1e-4, 5e-4, 256, 74, free=("*.bias",)
    )  # not certain: the rate


def resnet50() -> Recipe:
    """ResNet-50: 256 pictures a step for 90 epochs."""
    return _recipe("resnet50", RESNET, ResNet(), 1e-3, 0.05, 256, 90)  # not certain: rate and decay for AdamW


def resnet101() -> Recipe:
    """ResNet-101."""
    return _recipe("resnet101", RESNET, ResNet(depths=(3, 4, 23, 3)), 1e-3, 0.05, 256, 90)  # not certain: as above


def resnet152() -> Recipe:
    """ResNet-152."""
    return _recipe("resnet152", RESNET, ResNet(depths=(3, 8, 36, 3)), 1e-3, 0.05, 256, 90)  # not certain: as above


def vit_b16() -> Recipe:
    """ViT-B/16 on ImageNet alone (arXiv:2010.11929, table 3): 4,096 pictures a step for 300 epochs, rate 3e-3, decay 0.3."""
    return _recipe("vit_b16", VIT, ViT(shape=B16), 3e-3, 0.3, 4096, 300, warmup=10_000 / (300 * IMAGENET / 4096))


def vit_l16() -> Recipe:
    """ViT-L/16."""
    return _recipe("vit_l16", VIT, ViT(shape=L16), 3e-3, 0.3, 4096, 300, warmup=10_000 / (300 * IMAGENET / 4096))
