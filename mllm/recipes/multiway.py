"""VLMo (arXiv:2111.02358), VL-BEiT (arXiv:2206.01127) and BEiT-3 (arXiv:2208.10442): experts of modalities in one transformer.

VLMo: pictures first (BEiT), then text through experts of its own while all that pictures have taught stands still, then pairs by
contrast, matching and masked words; 1,024 a step, decay 0.01, a tenth of 200,000 steps warm-up and a straight way down.
VL-BEiT and BEiT-3: nothing but masked data, as many pictures as texts as pairs in each step.

Deviations: positions are learned vectors, as in the papers, where VLMo's code has relative biases, which attention over packs
has not; codes are those of Chameleon's VQ encoder, where the papers have the tokenizers of DALL-E and BEiT v2; pictures are the
middle square without augmentation; single tokens are masked where VLMo masks whole words; VLMo's second contrast behind its
fused layers is left away. A text of more than 196 tokens (128) is cut: let rows of the corpora of texts be paragraphs.
"""

from mllm.dual import Layers
from mllm.masked import Codebook
from mllm.multiway import Multiway
from mllm.objectives import Contrastive, HardMatching, MaskedData, MaskedTokens, Sum, Term
from mllm.recipe import AdamW, Cosine, Epochs, Linear, Recipe, Source, Stage, Steps, Tuning
from mllm.recipes.shared import decayed
from pipelines.corpora import Corpus, Labelled, Pairs, TextOnly
from pipelines.tiling import Resize

BASE = Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072)
LARGE = Layers(hidden_size=1024, layers=24, heads=16, intermediate_size=4096)
GIANT = Layers(hidden_size=1408, layers=40, heads=16, intermediate_size=6144)

CODES = Codebook(weights="chameleon-vqgan")

FREE = {
    "vision": ("layers.*.vision.*.bias", "layers.*.vision.norm.weight", "*patches.bias"),
    "language": ("layers.*.language.*.bias", "layers.*.language.norm.weight", "word_norm.*"),
    "fused": ("layers.*.both.*.bias", "layers.*.both.norm.weight"),
    "attention": (
        *(f"layers.*.{name}" for name in ("query.bias", "value.bias", "out.bias", "attention_norm.*")),
        "norm.*",
    ),
    "words": ("to_words.*bias", "to_words*norm.weight"),
    "codes": ("*to_codes.bias",),
    "matching": ("*pooler.bias", "*match.bias"),
    "contrast": ("*scale",),
}
"""Of each part what has no weight decay: biases and gains. Patterns over all names would train what stands still."""

CAPTION = 15
"""Tokens of a caption, about."""

PAIRS: tuple[Corpus, ...] = tuple(Pairs(name=name) for name in ("coco-captions", "visual-genome", "sbu", "cc3m"))
BOOKS: tuple[Corpus, ...] = (TextOnly(name="wikipedia-en"), TextOnly(name="bookcorpus"))


def _trained(parts: tuple[str, ...], lr: float, weight_decay: float) -> dict[str, Tuning]:
    return decayed(parts, lr, weight_decay, tuple(pattern for part in parts for pattern in FREE[part]))


def _vlmo(name: str, shape: Layers, fused: int, text_lr: float, lr: float) -> Recipe:
    picture = (224 // 16) ** 2
    image = Stage(
        name="image",
        mixture=(Source(corpus=Labelled(name="imagenet-22k")),),
        tune=_trained(("vision", "attention", "codes"), 1.5e-3, 0.05),
        context=64 * (picture + 2),
        max_tiles=64,
        tokens_per_step=2048 * (picture + 2),
        duration=Epochs(count=150),
        objective=MaskedData(patches=75 / 196),
        optimizer=AdamW(betas=(0.9, 0.999), clip=3.0),
        schedule=Cosine(warmup=10 / 150),  # not certain: 10,000 steps, about this share
    )
    adamw = AdamW(betas=(0.9, 0.98))
    text = Stage(
        name="text",
        mixture=tuple(Source(corpus=corpus) for corpus in BOOKS),
        tune=_trained(("language", "words"), text_lr, 0.01),
        context=32 * 196,
        tokens_per_step=1024 * 196,
        duration=Steps(count=200_000),
        objective=MaskedData(),
        optimizer=adamw,
        schedule=Linear(warmup=0.1),
    )
    everything = ("vision", "language", "fused", "attention", "words", "matching", "contrast")
    pairs = Stage(
        name="pairs",
        mixture=tuple(Source(corpus=corpus) for corpus in PAIRS),
        tune=_trained(everything, lr, 0.01),
        context=32 * (picture + CAPTION),
        max_tiles=32,
        tokens_per_step=1024 * (picture + CAPTION),
        duration=Steps(count=200_000),
        objective=Sum(
            terms=(Term(objective=Contrastive()), Term(objective=HardMatching()), Term(objective=MaskedTokens()))
        ),
        optimizer=adamw,
        schedule=Linear(warmup=0.1),
    )
    model = Multiway(shape=shape, fused=fused, codebook=CODES, drop_path=0.1, tokenizer="bert-base-uncased")
    return Recipe(
        name=name, paper="arXiv:2111.02358", model=model, tiling=Resize(size=224), stages=(image, text, pairs)
    )


def vlmo_base() -> Recipe:
    """VLMo-Base: vision-language experts in the top 2 of 12 layers, 175 million weights."""
    return _vlmo("vlmo_base", BASE, 2, 2e-4, 2e-4)


def vlmo_large() -> Recipe:
    """VLMo-Large: vision-language experts in the top 3 of 24 layers, 562 million weights."""
    return _vlmo("vlmo_large", LARGE, 3, 2e-4, 5e-5)  # not certain: the rate of the text's stage


def _masked_data(
    name: str, paper: str, model: Multiway, corpora: tuple[tuple[Corpus, ...], ...], lr: float, steps: int
) -> Recipe:
    """One stage over kinds of corpora that have equal shares."""
    sources = tuple(Source(corpus=corpus, weight=1 / len(kind)) for kind in corpora for corpus in kind)
    a_row = (2 * (model.cells + 2) + CAPTION + TEXT) / 3
    context = round(96 * a_row)
    stage = Stage(
        name="pretrain",
        mixture=sources,
        tune=_trained(("vision", "language", "fused", "attention", "words", "codes"), lr, 0.05),
        context=context,
        max_tiles=96,
        tokens_per_step=64 * context,
        duration=Steps(count=steps),
        objective=MaskedData(),
        optimizer=AdamW(betas=(0.9, 0.98)),
        schedule=Cosine(warmup=10_000 / steps),
    )
    return Recipe(name=name, paper=paper, model=model, tiling=Resize(size=model.image), stages=(stage,))


TEXT = 128
"""Tokens of a text by itself."""


def vl_beit_base() -> Recipe:
    """VL-BEiT (arXiv:2206.01127), base: 6,144 rows a step, a third of each kind."""
    model = Multiway(
        shape=BASE, fused=2, codebook=CODES, context=TEXT, drop_path=0.1, tokenizer="bert-base-uncased"
    )  # not certain: how many layers are fused, stochastic depth, the length of texts
    pictures = (Labelled(name="imagenet-22k"),)
    return _masked_data(
        "vl_beit_base", "arXiv:2206.01127", model, (pictures, BOOKS, PAIRS), 2e-3, 480_000
    )  # not certain: the rate


def _beit3(name: str, shape: Layers, patch: int = 16) -> Recipe:
    model = Multiway(
        shape=shape,
        fused=3,
        codebook=CODES,
        patch=patch,
        vocab_size=64_010,
        context=TEXT,  # not certain
        layer_scale=None,
        drop_path=0.1,
        tokenizer="beit3",
        bos="<s>",
        eos="</s>",
        mask=64_001,
    )
    texts = (*BOOKS, *(TextOnly(name=name) for name in ("openwebtext", "cc-news", "stories")))
    kinds = ((Labelled(name="imagenet-22k"),), texts, (*PAIRS, Pairs(name="cc12m")))
    return _masked_data(name, "arXiv:2208.10442", model, kinds, 1e-3, 1_000_000)


def beit3_base() -> Recipe:
    """BEiT-3 (arXiv:2208.10442), base: vision-language experts in the top 3 layers. Not certain: its numbers, the giant's."""
    return _beit3("beit3_base", BASE)


def beit3_large() -> Recipe:
    """BEiT-3 (arXiv:2208.10442), large. Not certain: its numbers, the giant's."""
    return _beit3("beit3_large", LARGE)


def beit3_giant() -> Recipe:
    """BEiT-3 (arXiv:2208.10442), 1.9 billion weights (table 2): 40 layers 1,408 wide, patches of 14 pixels, a million steps."""
    return _beit3("beit3_giant", GIANT, patch=14)
