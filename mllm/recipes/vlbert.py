"""VL-BERT (arXiv:1908.08530): every position of BERT sees the picture; masked words and masked regions' classes, no matching.

Conceptual Captions and, as often, texts alone (BooksCorpus and Wikipedia, 64 tokens); up to 100 regions and the whole picture as
a box; 32 pairs and 32 texts on each of 4 GPUs, 10 epochs of the captions, rate 1e-7 for each of the step's rows, 16,000 steps of
warm-up, decay 1e-4, gradients of norm 10. Deviations: features are read as the detector left them, where the paper's larger
runs train it too; the whole picture's are the mean of its regions'. The mean number of regions is not certain.
"""

from mllm.crossmodal import VLBERT, CrossModal
from mllm.dual import Layers
from mllm.objectives import MaskedRegions, MaskedTokens, Sum, Term
from mllm.recipe import AdamW, Linear, Recipe, Source, Stage, Steps
from mllm.recipes.shared import decayed
from mllm.recipes.uniter import BERT_BASE, BERT_LARGE, DETECTED, PARTS
from pipelines.corpora import Pairs, TextOnly
from pipelines.objects import Objects

PAIRS = TEXTS = 4 * 32
STEPS = 3_300_000 * 10 // PAIRS


def _recipe(name: str, shape: Layers, weights: str) -> Recipe:
    mixture = (
        Source(corpus=Pairs(name="cc3m"), weight=1.0),
        Source(corpus=TextOnly(name="books-wikipedia"), weight=1.0),
    )
    a_step = PAIRS * (50 + 2 + 16) + TEXTS * 64
    stage = Stage(
        name="pretrain",
        mixture=mixture,
        tune=decayed(PARTS, 1e-7 * (PAIRS + TEXTS), 1e-4, ("*.bias", "*LayerNorm.weight", "looks.of_*.weight")),
        context=a_step // 4,
        max_tiles=a_step // 4,
        tokens_per_step=a_step,
        duration=Steps(count=STEPS),
        objective=Sum(
            terms=(
                Term(objective=MaskedTokens()),
                Term(objective=MaskedRegions(targets=("classes",))),
            )
        ),
        optimizer=AdamW(clip=10.0),
        schedule=Linear(warmup=16_000 / STEPS),
    )
    model = CrossModal(arch=VLBERT(shape=shape, row=DETECTED), weights=weights, dropout=0.1, attention_dropout=0.1)
    return Recipe(name=name, paper="arXiv:1908.08530", model=model, tiling=Objects(row=DETECTED), stages=(stage,))


def vl_bert_base() -> Recipe:
    """VL-BERT on BERT-base."""
    return _recipe("vl_bert_base", BERT_BASE, "bert-base-uncased")


def vl_bert_large() -> Recipe:
    """VL-BERT on BERT-large."""
    return _recipe("vl_bert_large", BERT_LARGE, "bert-large-uncased")
