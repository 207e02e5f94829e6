"""What a run is: a model, a tiling and a list of stages, as one value.

    recipe = vila_7b()                                           a Python function returns it
    load(dump(recipe)) == recipe                                 it survives JSON
    override(recipe, ["stages.pretrain.tune.lm.lr=3e-5"])        and a change is checked as a whole

Each thing's words stand beside the thing; those that have no room below -- tuning, optimiser, parallelism -- are in `mllm.ways`,
and come from here to whoever writes recipes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from mllm.aligned import Aligned
from mllm.annotators import Annotator, DiscreteCodes, FrozenFeatures, ReferenceLogProbs
from mllm.archs import MPT, T5
from mllm.care import Gate, Guard
from mllm.changes import RecipeError, assign, explain, parse, respelled
from mllm.classify import Classifier
from mllm.crossmodal import CrossModal
from mllm.dual import DualTower
from mllm.fusion import UnifiedVocabulary
from mllm.instructed import Instructions
from mllm.masked import MaskedImage
from mllm.multiway import Multiway
from mllm.objectives import DPO, AtOnce, Gathered, NextToken, Objective, OneOf, Sum, TwoVocabularies
from mllm.streams import SingleStream
from mllm.vlm import VLM
from mllm.ways import (
    DDP,
    FSDP,
    WSD,
    AdamW,
    Constant,
    Cosine,
    Dtype,
    Duration,
    Epochs,
    Frozen,
    Full,
    Linear,
    LoRA,
    Muon,
    Optimizer,
    Parallel,
    Positive,
    Rate,
    Recompute,
    Schedule,
    Share,
    Steps,
    Tokens,
    Tuning,
    ZeRO,
)
from ops.attention import Backend
from ops.context import heads_fit
from pipelines.corpora import Corpus
from pipelines.manifest import Manifest
from pipelines.order import BySize, ByWeight, Drawn, Sampling, Scheduled
from pipelines.packing import Grouping
from pipelines.tiling import Tiling
from pipelines.types import Budget, spec


@spec
class Source:
    """A corpus in a mixture. `weight` is its share of the rows, relative to the others'; without weights, shares go by size.

    `cap`, `repeat` and `group` are those of `pipelines.order.Drawn`; `loss_weight` multiplies the loss of its tokens.
    `max_bad` is the share of a shard's rows that may be dropped before the run stops, once `min_rows` of it were seen.
    """

    corpus: Corpus
    weight: Rate | None = None
    cap: Positive | None = None
    repeat: Rate = 1.0
    group: Positive = 1
    loss_weight: Rate = 1.0
    max_bad: Share = 0.1
    min_rows: Positive = 20

    def drawn(self, manifest: Manifest) -> Drawn:
        """The source as an order draws from it, once its corpus is found."""
        return Drawn(manifest=manifest, weight=self.weight, cap=self.cap, repeat=self.repeat, group=self.group)


@spec
class Stage:
    """One stage of the curriculum. A part that `tune` does not name is frozen.

    `context` is the length of a pack in tokens and `max_tiles` its tiles; a step is `tokens_per_step // context` packs,
    whatever the number of workers. `window` rows are shuffled and packed together, read in runs of `chunk`. `sampling` None
    goes by weight where sources have one, else by size; `grouping` says which samples may share a pack; `annotators` are
    models that run in the pipeline. With `ema` the stage's result is the moving average of its weights, each step's entering by
    1 - `ema`. `attention` asks for a backend, where the best that a machine has is not meant. A checkpoint is written every
    `save_every` steps, and where `save_minutes` have gone by without one; the newest is evaluated beside training where
    `evaluate_every` steps have gone by since the last that was.

    The stage goes on from the weights of the stage `after`, by default the one that stands before it, and with
    `carry_optimizer` from its moments too; it begins when its `entry` is open. `guard` judges its steps. `rope_theta` is the base
    of rotary positions from this stage on, which longer contexts want greater (LWM, arXiv:2402.08268, 3.1), and `tiling` cuts
    pictures from this stage on in place of the recipe's, for encoders that see larger ones later (Qwen-VL, CogVLM).
    """

    name: str
    mixture: tuple[Source, ...]
    tune: dict[str, Tuning]
    context: Positive
    tokens_per_step: Positive
    max_tiles: Positive = 16
    duration: Duration = Epochs()
    objective: Objective = NextToken()
    optimizer: Optimizer = AdamW()
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    schedule: Schedule = Cosine()
    parallel: Parallel = FSDP()
    sampling: Sampling | None = None
    grouping: Grouping = "mixed"
    annotators: tuple[Annotator, ...] = ()
    window: Positive = 1024
    chunk: Positive = 32
    save_every: Positive = 200
    save_minutes: Annotated[float, Field(gt=0)] | None = None
    evaluate_every: Positive | None = None
    attention: Backend | None = None
    after: str | None = None
    entry: Gate | None = None
    carry_optimizer: bool = False
    guard: Guard = Guard()
    rope_theta: Rate | None = None
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        if not self.mixture:
            raise ValueError(f"stage {self.name!r} has an empty mixture; give it at least one Source")
        if all(isinstance(how, Frozen) for how in self.tune.values()):
            raise ValueError(f"stage {self.name!r} trains nothing; name a part in tune")
        if isinstance(self.parallel, ZeRO) and self.ema is not None:
            raise ValueError(f"stage {self.name!r}: ema averages shards that ZeRO keeps to itself; take FSDP or DDP")
        if isinstance(self.parallel, ZeRO) and (isinstance(self.optimizer, Muon) or self.optimizer.bits == 8):
            raise ValueError(
                f"stage {self.name!r}: ZeRO steps by a plain AdamW; take FSDP or DDP for {self.optimizer.kind}"
            )
        if self.tokens_per_step < self.context:
            raise ValueError(
                f"stage {self.name!r}: tokens_per_step={self.tokens_per_step} is less than one pack of context={self.context}"
            )

    @property
    def packs_per_step(self) -> int:
        return self.tokens_per_step // self.context

    @property
    def drawing(self) -> BySize | ByWeight | Scheduled:
        """How shares of the mixture are found."""
        weighted = any(source.weight is not None for source in self.mixture)
        return self.sampling or (ByWeight() if weighted else BySize())

    @property
    def budget(self) -> Budget:
        return Budget(tokens=self.context, tiles=self.max_tiles)


ModelKind = Annotated[
    VLM | DualTower | Classifier | MaskedImage | SingleStream | CrossModal | Multiway | Aligned,
    Field(discriminator="kind"),
]


@spec
class Recipe:
    """A run's science, portable: it names corpora and weights, and the site says where they are.

    `held_out` corpora are never trained on; they are evaluated before and after every stage. `shots` is the few-shot probe.
    `paper` says where the system was published: `arXiv:` and the number, or a venue in words. It changes nothing of a run.
    """

    name: str
    model: ModelKind
    tiling: Tiling
    stages: tuple[Stage, ...]
    held_out: tuple[Corpus, ...] = ()
    shots: tuple[int, ...] = (0, 4)
    seed: int = 0
    paper: str = ""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            raise ValueError(f"recipe {self.name!r}: stages need names of their own, found {names}")
        self.model.layout(self.tiling)  # tiling and encoder must fit
        self._stages_follow()
        self._annotators_fit()
        for stage in self.stages:
            layout = self.model.layout(self.tiling_of(stage))
            if layout.tokens_per_tile >= stage.context:
                raise ValueError(
                    f"stage {stage.name!r}: one tile is {layout.tokens_per_tile} tokens and a pack holds {stage.context}; "
                    "raise context or choose a smaller tiling"
                )
            self._objective_fits(stage)
            parallel, heads = stage.parallel, self.model.heads
            by, ranks = (parallel.context_by, parallel.context) if isinstance(parallel, FSDP) else ("ring", 1)
            if ranks > 1 and isinstance(self.model, VLM) and not self.model.fusion.shares:
                raise ValueError(
                    f"stage {stage.name!r}: context={ranks} ranks share each pack, and under the fusion "
                    f"{self.model.fusion.kind!r} a rank must see all of it; take context=1"
                )
            arch = self.model.lm.arch if isinstance(self.model, VLM) else None
            if stage.rope_theta is not None and not hasattr(arch, "rope_theta"):
                raise ValueError(
                    f"stage {stage.name!r}: rope_theta is the base of rotary positions, and "
                    f"{self.model.kind if arch is None else arch.kind!r} has none; leave it away"
                )
            if ranks > 1 and isinstance(arch, T5 | MPT):
                raise ValueError(
                    f"stage {stage.name!r}: context={ranks} ranks share each pack, which {arch.kind!r} cannot; take context=1"
                )
            if heads and (reason := heads_fit(by, ranks, *heads)):
                raise ValueError(f"stage {stage.name!r}: {reason}")
            longest = self.model.words.longest
            if longest is not None and stage.context > longest:
                raise ValueError(
                    f"stage {stage.name!r}: context={stage.context} exceeds the language model's {longest}"
                )

    def model_of(self, stage: Stage) -> ModelKind:
        """The model as `stage` trains it, and as it is after it: with the rotary base that was last asked for."""
        asking: Stage | None = stage
        while asking is not None and asking.rope_theta is None:
            asking = self.before(asking)
        if asking is None or asking.rope_theta is None:
            return self.model
        lm = self.vlm.lm
        return replace(self.vlm, lm=replace(lm, arch=replace(lm.arch, rope_theta=asking.rope_theta)))  # type: ignore[call-arg]  # it has one, see __post_init__

    def tiling_of(self, stage: Stage) -> Tiling:
        """How `stage` cuts pictures: as it or the last before it says, else as the recipe does."""
        asking: Stage | None = stage
        while asking is not None and asking.tiling is None:
            asking = self.before(asking)
        return self.tiling if asking is None or asking.tiling is None else asking.tiling

    def before(self, stage: Stage) -> Stage | None:
        """The stage whose weights `stage` goes on from; None for one that begins with the model's own."""
        if stage.after is not None:
            return self.stage(stage.after)
        at = [one.name for one in self.stages].index(stage.name)
        return self.stages[at - 1] if at else None

    def _stages_follow(self) -> None:
        for number, stage in enumerate(self.stages):
            earlier = [one.name for one in self.stages[:number]]
            if stage.after is not None and stage.after not in earlier:
                raise ValueError(
                    f"stage {stage.name!r} comes after {stage.after!r}, and the stages before it are {earlier}; "
                    "name one of those, or move it"
                )
            if not earlier and (stage.entry or stage.carry_optimizer):
                raise ValueError(
                    f"stage {stage.name!r} is the first: nothing is before it that an entry or moments could be of"
                )
            before = self.before(stage)
            if stage.carry_optimizer and before and not _same_moments(stage, before):
                raise ValueError(
                    f"stage {stage.name!r} carries the moments of {before.name!r} on, and they do not train the same parts in "
                    "the same way with full weights; give both the same tune keys and optimizer, or leave carry_optimizer away"
                )
            held = [corpus.name for corpus in self.held_out]
            if stage.entry and stage.entry.tokens is None and not held:
                raise ValueError(
                    f"stage {stage.name!r}: its entry looks at held-out rows, and the recipe holds none out"
                )
            if stage.entry and stage.entry.source not in (None, *held):
                raise ValueError(
                    f"stage {stage.name!r}: its entry looks at {stage.entry.source!r}, and held out are {held}"
                )

    def _objective_fits(self, stage: Stage) -> None:
        """The model must be able to learn the objective, and the engine to train it so."""
        kind, parallel = stage.objective.kind, stage.parallel
        kinds = stage.objective.kinds if isinstance(stage.objective, Sum | OneOf | AtOnce) else (kind,)
        for one in kinds:
            if one in self.model.learns:
                continue
            raise ValueError(
                f"stage {stage.name!r}: a model of kind {self.model.kind!r} cannot learn {one!r}; it learns "
                f"{', '.join(self.model.learns)}"
            )
        among = [one for one in kinds if one in ("contrastive", "retrieval_token")]
        if among and any(source.loss_weight != 1 for source in stage.mixture):
            raise ValueError(
                f"stage {stage.name!r}: {among[0]} compares all pairs with each other, and a source's loss_weight would count "
                "for nothing; leave it at 1"
            )
        if isinstance(stage.objective, DPO) and not any(isinstance(a, ReferenceLogProbs) for a in stage.annotators):
            raise ValueError(
                f"stage {stage.name!r}: dpo compares with a reference; add reference_log_probs to the stage's annotators"
            )
        plain = isinstance(self.model, VLM) and not isinstance(stage.objective, Gathered)
        if isinstance(parallel, ZeRO) and not plain:
            raise ValueError(
                f"stage {stage.name!r}: ZeRO trains language models by objectives that see one pack; take FSDP or DDP for "
                f"{self.model.kind} with {kind}"
            )
        by_position = (plain and not isinstance(stage.objective, DPO)) or isinstance(stage.objective, TwoVocabularies)
        if isinstance(parallel, FSDP) and parallel.context > 1 and not by_position:
            raise ValueError(
                f"stage {stage.name!r}: packs of {self.model.kind} with {kind} cannot be shared between ranks; set context to 1"
            )

    def _annotators_fit(self) -> None:
        """What is made in the pipeline must be what the model takes."""
        vocabulary = self.model.words.vocabulary
        if isinstance(self.model, VLM) and isinstance(self.model.fusion, UnifiedVocabulary):
            vocabulary += self.model.fusion.rows
        for number, stage in enumerate(self.stages):
            of_packs = [one for one in stage.annotators if isinstance(one, (FrozenFeatures, ReferenceLogProbs))]
            kinds = [one.kind for one in of_packs]
            if len(kinds) > len(set(kinds)):
                raise ValueError(f"stage {stage.name!r}: its annotators are {kinds}, one of them twice; leave one away")
            if kinds == ["frozen_features", "reference_log_probs"]:
                raise ValueError(
                    f"stage {stage.name!r}: reference_log_probs looks at tiles, and frozen_features before it takes them away; "
                    "put it first"
                )
            for one in of_packs:
                if isinstance(one, FrozenFeatures):
                    self._features_are_the_models(number, one)
                elif one.checkpoint is None and self.before(stage) is None:
                    raise ValueError(
                        f"stage {stage.name!r} is the first, and its reference would be what it begins with; name an export as "
                        "the reference's checkpoint, or put a stage before it"
                    )
            for one in stage.annotators:
                if isinstance(one, Instructions) and one.of != self.model.words.tokenizer:
                    raise ValueError(
                        f"stage {stage.name!r}: instructions are read back by the tokenizer {one.of!r}, and documents are "
                        f"written by {self.model.words.tokenizer!r}; set the annotator's `of` to that"
                    )
                if isinstance(one, DiscreteCodes) and one.last >= vocabulary:
                    raise ValueError(
                        f"stage {stage.name!r}: discrete_codes writes ids up to {one.last} and the language model has a "
                        f"vocabulary of {vocabulary}; raise model.lm.arch.vocab_size or lower first"
                    )

    def _features_are_the_models(self, number: int, features: FrozenFeatures) -> None:
        """Features made in the pipeline must be those that the model's own encoder would make."""
        stage = self.stages[number]
        if not isinstance(self.model, VLM):
            raise ValueError(
                f"stage {stage.name!r}: frozen_features are for a model of kind 'vlm', not {self.model.kind!r}"
            )
        if self.tiling_of(stage).join == "slices":
            raise ValueError(
                f"stage {stage.name!r}: frozen_features are of square tiles, and this tiling cuts slices of any shape; leave the "
                "annotator away"
            )
        if features.encoder != self.model.encoder or features.encoder.weights is None:
            raise ValueError(
                f"stage {stage.name!r}: frozen_features must have the model's own encoder, with weights; it has "
                f"{features.encoder} and the model {self.model.encoder}"
            )
        for before in self.stages[: number + 1]:
            if any(part.split(".")[0] == "encoder" for part in before.tune):
                raise ValueError(
                    f"stage {stage.name!r} takes frozen features and stage {before.name!r} tunes the encoder; "
                    "leave one of them away"
                )

    @property
    def vlm(self) -> VLM:
        """The model, for what is of vision-language models alone. Raises ValueError for another kind."""
        if not isinstance(self.model, VLM):
            raise ValueError(
                f"recipe {self.name!r} has a model of kind {self.model.kind!r}, and this is for vision-language models"
            )
        return self.model

    @property
    def instructions(self) -> Instructions | None:
        """How its last stage's connector is told the instruction, if it reads one."""
        return next((one for one in self.stages[-1].annotators if isinstance(one, Instructions)), None)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def _same_moments(stage: Stage, before: Stage) -> bool:
    """Whether the optimisers of two stages hold the same numbers."""
    full = all(
        isinstance(how, Full) for one in (stage, before) for how in one.tune.values() if not isinstance(how, Frozen)
    )
    kinds = type(stage.optimizer) is type(before.optimizer) and type(stage.parallel) is type(before.parallel)
    return full and kinds and stage.tune.keys() == before.tune.keys()


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def dump(recipe: Recipe) -> str:
    """The recipe as JSON, every default written out."""
    return _adapter().dump_json(recipe, indent=2).decode()


def load(text: str | bytes) -> Recipe:
    """Read what `dump` wrote. Raises RecipeError with the path of each fault."""
    try:
        return _adapter().validate_json(text)
    except ValidationError as error:
        raise RecipeError(explain(error, _read(text))) from error


def _read(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None  # no JSON at all, as the fault itself says


def fingerprint(recipe: Recipe, stage: Stage, before: str) -> str:
    """Names a stage by all that decides its result: itself, the model, the data's shape, and the stage before it."""
    words = json.loads(dump(recipe))
    mine = next(s for s in words["stages"] if s["name"] == stage.name)
    # These change nothing of what is learned.
    for how in ("save_every", "save_minutes", "evaluate_every", "attention", "entry", "after"):
        del mine[how]
    if mine["tiling"] is None:
        del mine["tiling"]
    mine["parallel"] = [mine["parallel"]["dtype"], mine["parallel"].get("float8", False)]
    for annotator in mine["annotators"]:
        annotator.pop("cache", None)  # nor does where features are kept
    text = json.dumps([words["model"], words["tiling"], words["seed"], mine, before], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def override(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """The recipe with `key=value` changes; stages are addressed by name, values are JSON or plain words, and a `kind` may be
    written without its underscores.

    Raises RecipeError for a key that is not there (with the nearest one) or a value that does not fit.
    """
    words = json.loads(dump(recipe))
    changed = False
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise RecipeError(f"{change!r} is no override; write key=value, as in stages.align.tune.connector.lr=1e-3")
        assign(words, key.strip(), parse(value))
        changed = True
    return _loaded(words) if changed else recipe


def _loaded(words: dict[str, Any]) -> Recipe:
    """The recipe of these words, as a person may spell them. Raises RecipeError."""
    try:
        return load(json.dumps(words))
    except RecipeError as error:
        fault = error.__cause__
        if isinstance(fault, ValidationError) and respelled(words, fault):
            return _loaded(words)  # one kind may hide another within it
        raise


__all__ = [
    "DDP",
    "FSDP",
    "WSD",
    "AdamW",
    "Constant",
    "Cosine",
    "Dtype",
    "Epochs",
    "Frozen",
    "Full",
    "Linear",
    "LoRA",
    "Muon",
    "Optimizer",
    "Parallel",
    "Recipe",
    "RecipeError",
    "Recompute",
    "Schedule",
    "Source",
    "Stage",
    "Steps",
    "Tokens",
    "Tuning",
    "ZeRO",
    "dump",
    "fingerprint",
    "load",
    "override",
]
