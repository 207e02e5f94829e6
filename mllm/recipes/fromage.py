"""FROMAGe (arXiv:2301.13823): a frozen language model sees pictures through one matrix, and finds them by one token, [RET].

180 pairs a step, rate 3e-4 after 100 steps, betas (0.9, 0.95), no decay, 20,000 steps of Conceptual Captions, the caption's
loss and the contrast's alike. Deviations: two captions are never joined to one (half are, there); the words' rows behind OPT's
own 50,265 are trained, of which [RET] is one and the others stand for nothing; captions predict [RET] as well.
"""

from mllm.connectors import FirstFeature
from mllm.encoders import Encoder
from mllm.lm import CausalLM
from mllm.objectives import NextToken, RetrievalToken, Sum, Term
from mllm.recipe import AdamW, Constant, Full, Recipe, Source, Stage, Steps
from mllm.recipes.blip2 import OPT_6_7B
from mllm.recipes.shapes import CLIP_L_224
from mllm.vlm import VLM
from pipelines.corpora import CaptionList
from pipelines.tiling import Resize

ROWS = 50_265
"""Words that OPT's tokenizer has; [RET] is the next."""


def fromage() -> Recipe:
    """Three matrices and one row learn, 5.5 million weights; the encoder and OPT-6.7B stay as they are."""
    a_pair = 1 + 24
    stage = Stage(
        name="ground",
        mixture=(Source(corpus=CaptionList(name="cc3m")),),
        tune={"connector": Full(lr=3e-4), "lm.embeddings": Full(lr=3e-4, first_row=ROWS)},
        context=60 * a_pair,
        max_tiles=60,
        tokens_per_step=180 * a_pair,
        duration=Steps(count=20_000),
        objective=Sum(terms=(Term(objective=NextToken()), Term(objective=RetrievalToken()))),
        optimizer=AdamW(betas=(0.9, 0.95)),
        schedule=Constant(warmup=0.005),
    )
    lm = CausalLM(arch=OPT_6_7B.arch, weights=OPT_6_7B.weights, tokenizer="opt-ret", bos="</s>", eos="[RET]")
    encoder = Encoder(arch=CLIP_L_224, weights="openai/clip-vit-large-patch14", layer=-1, cls="keep", normed=True)
    model = VLM(encoder=encoder, connector=FirstFeature(), lm=lm)
    return Recipe(name="fromage", paper="arXiv:2301.13823", model=model, tiling=Resize(size=224), stages=(stage,))
