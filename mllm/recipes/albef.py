"""ALBEF (arXiv:2107.07651) and BLIP (arXiv:2201.12086): a contrast taught by a slow twin, hard matching, and words.

ALBEF: 512 pairs a step, rate 1e-4 down to 1e-5 by half a cosine after 1,000 steps, decay 0.02, 30 epochs of 4 million pictures.
BLIP: 2,880 pairs a step with ViT-B and 2,400 with ViT-L, rates 3e-4 and 2e-4 after 3,000 steps, times 0.9 an epoch, decay 0.05,
20 epochs. Deviations: negatives are the step's pairs of all ranks and the queue, where ALBEF and BLIP take one GPU's; the queue
begins empty, where theirs begins with random vectors; the twin's dropout is off, where their code leaves it on; pictures are cut
to their middle square, where theirs are cropped at random and, in ALBEF, changed by RandAugment; what begins from ImageNet's ViT
there begins from nothing here, unless `model.encoder.weights` names some.
"""

from dataclasses import replace

from mllm.aligned import ALBEF, BLIP, Aligned, Twin
from mllm.annotators import Recaption, ScoreFilter
from mllm.dual import Layers
from mllm.encoders import BlipVision, Encoder, ViT
from mllm.objectives import Captioning, DistilledTokens, HardMatching, MomentumContrast, Sum, Term
from mllm.recipe import WSD, AdamW, Cosine, Epochs, Recipe, Source, Stage
from mllm.recipes.blip import BERT as TOKENIZER
from mllm.recipes.shared import decayed
from pipelines.corpora import Pairs
from pipelines.tiling import Resize

TEXT = 15
"""Tokens of a caption, about."""

BERT = Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072)
WITHOUT_DECAY = ("*.bias", "*norm*.weight", "*LayerNorm.weight", "*temperature")


def albef() -> Recipe:
    """ALBEF on COCO, Visual Genome, SBU and Conceptual Captions: 85.8 million weights see, 123.7 million read and fuse."""
    pictures, pairs = 4_000_000, 512
    a_pair = 257 + TEXT
    stage = Stage(
        name="pretrain",
        mixture=tuple(Source(corpus=Pairs(name=name)) for name in ("coco-captions", "visual-genome", "sbu", "cc3m")),
        tune=decayed(("vision", "text", "head"), 1e-4, 0.02, WITHOUT_DECAY),
        context=64 * a_pair,
        max_tiles=64,
        tokens_per_step=pairs * a_pair,
        duration=Epochs(count=30),
        objective=Sum(
            terms=(
                Term(objective=MomentumContrast(soft=0.4, ramp=pictures)),
                Term(objective=HardMatching()),
                Term(objective=DistilledTokens(share=0.15, soft=0.4, ramp=pictures)),
            )
        ),
        optimizer=AdamW(betas=(0.9, 0.999)),
        schedule=Cosine(warmup=1000 / (30 * pictures / pairs), floor=0.1),
    )
    model = Aligned(
        encoder=Encoder(
            arch=ViT(hidden_size=768, layers=12, heads=12, intermediate_size=3072, patch=16, image=256),
            layer=-1,
            cls="keep",
            normed=True,
        ),
        arch=ALBEF(text=BERT, fusion=6, dropout=0.1, attention_dropout=0.1),
        twin=Twin(momentum=0.995, queue=65_536),
        begins="bert-base-uncased",
        tokenizer="bert-base-uncased",
    )
    return Recipe(name="albef", paper="arXiv:2107.07651", model=model, tiling=Resize(size=256), stages=(stage,))


def blip_base() -> Recipe:
    """BLIP (arXiv:2201.12086) with ViT-B/16 on 14 million pictures; an export of it bootstraps `blip_large`."""
    pictures, pairs, epochs = 14_000_000, 2880, 20
    a_pair = 197 + TEXT
    corpora = ("coco-captions", "visual-genome", "cc3m", "cc12m", "sbu")
    warmup = 3000 / (epochs * pictures / pairs)
    stage = Stage(
        name="pretrain",
        mixture=tuple(Source(corpus=Pairs(name=name)) for name in corpora),
        tune=decayed(("vision", "text", "head"), 3e-4, 0.05, WITHOUT_DECAY),
        context=45 * a_pair,
        max_tiles=45,
        tokens_per_step=pairs * a_pair,
        duration=Epochs(count=epochs),
        objective=Sum(
            terms=(
                Term(objective=MomentumContrast(soft=0.4, ramp=2 * pictures)),
                Term(objective=HardMatching()),
                Term(objective=Captioning(smoothing=0.1)),
            )
        ),
        schedule=WSD(warmup=warmup, decay=1 - warmup, halvings=3.04),  # 0.9 an epoch, twenty times
    )
    model = Aligned(
        encoder=Encoder(
            arch=BlipVision(hidden_size=768, layers=12, heads=12, intermediate_size=3072, patch=16, image=224),
            layer=-1,
            cls="keep",
            normed=True,
        ),
        arch=BLIP(text=BERT, dropout=0.1, attention_dropout=0.1),
        twin=Twin(momentum=0.995, queue=57_600),
        begins="bert-base-uncased",
        tokenizer=TOKENIZER,
    )
    return Recipe(name="blip_base", paper="arXiv:2201.12086", model=model, tiling=Resize(size=224), stages=(stage,))


def blip_large() -> Recipe:
    """BLIP (arXiv:2201.12086) with ViT-L/16 on 129 million pictures: captions are the web's or a captioner's, if a filter agrees.

    CapFilt's two models (3.3) are an export of `blip_base`, each tuned on COCO first: `captioner/` writes, `retriever/` filters.
    The paper keeps both captions of a picture where both pass; here each row has one of the two.
    """
    base = blip_base()
    a_pair = 197 + TEXT
    vision = BlipVision(hidden_size=1024, layers=24, heads=16, intermediate_size=4096, patch=16, image=224)
    assert isinstance(base.model, Aligned)
    (stage,) = base.stages
    stage = replace(
        stage,
        mixture=(*stage.mixture, Source(corpus=Pairs(name="laion-115m"))),
        tune=decayed(("vision", "text", "head"), 2e-4, 0.05, WITHOUT_DECAY),
        context=40 * a_pair,
        max_tiles=40,
        tokens_per_step=2400 * a_pair,
        annotators=(
            Recaption(weights="blip-captioner", mode="either"),
            ScoreFilter(weights="blip-filter", at_least=0.5),
        ),
    )
    model = replace(base.model, encoder=replace(base.model.encoder, arch=vision))
    return replace(base, name="blip_large", model=model, stages=(stage,))
