"""LXMERT (arXiv:1908.07490): nine layers over words, five over regions, five across; four tasks and questions about pictures.

COCO and Visual Genome captions, VQA 2.0, GQA and Visual Genome's questions, 36 regions a picture. Masked words, matching, masked
regions (features by smooth L1, objects and attributes weighed by the detector's certainty), 9,500 answers. 256 rows a step, rate
1e-4, 20 epochs, texts of 20 tokens. One forward has all tasks: half of the texts are torn from their pictures, words and regions
of what is shown then are masked, and answers are asked of pairs that belong together. Deviations: hidden regions are zeros, of
which the released code leaves a fifth as another region or as they are; objects and attributes are told of hidden regions alone,
as the paper says, where the released code asks all of them. In the paper's other run answers are learned in the last ten epochs
alone: a second stage without their term before it.
"""

from mllm.crossmodal import LXMERT, CrossModal
from mllm.objectives import AtOnce, Classification, MaskedRegions, MaskedTokens, Matching, Term
from mllm.recipe import Epochs, Linear, Recipe, Source, Stage
from mllm.recipes.shared import decayed
from mllm.recipes.uniter import FREE, PARTS
from pipelines.corpora import Pairs, Questions
from pipelines.objects import Objects

A_ROW = 36 + 14


def lxmert() -> Recipe:
    """LXMERT from scratch, its answers learned from the first step on."""
    arch = LXMERT()
    stage = Stage(
        name="pretrain",
        mixture=(
            *(Source(corpus=Pairs(name=name)) for name in ("coco-captions", "visual-genome")),
            *(Source(corpus=Questions(name=name)) for name in ("vqa-v2", "gqa", "visual-genome-qa")),
        ),
        tune=decayed(PARTS, 1e-4, 0.01, FREE),
        context=64 * A_ROW,
        max_tiles=64 * 36,
        tokens_per_step=256 * A_ROW,
        duration=Epochs(count=20),
        objective=AtOnce(
            terms=(
                Term(objective=MaskedTokens()),
                Term(objective=Matching()),
                Term(objective=MaskedRegions(targets=("features", "classes", "attributes"), smooth=True, sure=True)),
                Term(objective=Classification()),
            )
        ),
        schedule=Linear(warmup=0.05),
    )
    model = CrossModal(arch=arch, answers=9500, tokenizer="bert-base-uncased", dropout=0.1, attention_dropout=0.1)
    return Recipe(
        name="lxmert",
        paper="arXiv:1908.07490",
        model=model,
        tiling=Objects(row=arch.row, least=36, most=36),
        stages=(stage,),
    )
