"""What in a recipe looks unlikely, though nothing forbids it: a plan says it, and a person decides.

Each is a sentence with the numbers that gave rise to it. Ranges of rates are those of the recipes here and of their papers.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.schedule import planned_steps
from mllm.objectives import DPO
from mllm.recipe import Full, LoRA, Recipe, Stage
from mllm.vlm import VLM
from pipelines.corpora import Interleaved, Obelics, TextOnly
from pipelines.objects import Objects
from pipelines.types import spec


@spec
class Usual:
    """The rates at which a part is trained, from the least to the most that is usual."""

    part: str
    low: float
    high: float


FULL = (
    Usual(part="lm", low=1e-6, high=2e-4),
    Usual(part="encoder", low=1e-7, high=2e-4),
    Usual(part="connector", low=1e-6, high=5e-3),
)
LORA = Usual(part="", low=1e-5, high=2e-3)

LONG_WARMUP = 0.3
SHORT_STAGE = 20


def doubts(recipe: Recipe, workers: int) -> tuple[str, ...]:
    """Sentences about `recipe` on so many `workers`, in the order of its stages."""
    found = [*(word for stage in recipe.stages for word in _of_stage(recipe, stage, workers)), *_of_all(recipe)]
    return tuple(found)


def _of_stage(recipe: Recipe, stage: Stage, workers: int) -> Iterator[str]:
    for words in (*_rates(recipe, stage), *_warm_up(stage), *_budgets(recipe, stage), *_ranks(stage, workers)):
        yield f"{stage.name}: {words}"


def _rates(recipe: Recipe, stage: Stage) -> Iterator[str]:
    scratch = not isinstance(recipe.model, VLM) or (recipe.vlm.lm.weights is None and recipe.vlm.weights is None)
    preferring = isinstance(stage.objective, DPO)  # which moves little, and is meant to
    for key, how in stage.tune.items():
        if isinstance(how, Full):
            usual = next((one for one in FULL if key == one.part), None)
        else:
            usual = LORA if isinstance(how, LoRA) else None
        if usual is None or not isinstance(how, Full | LoRA) or usual.low <= how.lr <= usual.high:
            continue
        if scratch and how.lr > usual.high and isinstance(how, Full):
            continue  # what begins from nothing learns at higher rates
        if preferring and how.lr < usual.low:
            continue
        side = "above" if how.lr > usual.high else "below"
        yield (
            f"{key} is trained at lr {how.lr:g}, {side} the usual {usual.low:g} to {usual.high:g}"
            f"{' of LoRA' if usual is LORA else ''}; if that is meant, watch the first steps' loss"
        )


def _warm_up(stage: Stage) -> Iterator[str]:
    share, steps = stage.schedule.warmup, planned_steps(stage)
    if share >= 1:
        yield "the warm-up lasts as long as the stage, so its rate is reached at the very end"
    elif share > LONG_WARMUP:
        yield f"the warm-up takes {share:.0%} of the stage; 1 to 5 % is usual"
    if steps is not None and 0 < share * steps < 1:
        yield f"the warm-up is less than one of {steps} steps, so the first is taken at the full rate"
    if steps is not None and stage.save_every > steps:
        yield f"it saves every {stage.save_every:,} steps and has {steps:,}, so a fault begins it anew"


def _budgets(recipe: Recipe, stage: Stage) -> Iterator[str]:
    tiling = recipe.tiling
    if isinstance(tiling, Objects):
        return  # regions are no tiles
    layout = recipe.model.layout(tiling)
    single = tiling.cut(tiling.size, tiling.size, limit=tiling.share(1))
    largest = tiling.cut(16 * tiling.size, 16 * tiling.size, limit=tiling.share(1))
    if layout.tokens(largest) >= stage.context:
        yield (
            f"its largest picture takes {layout.tokens(largest):,} tokens and a pack holds {stage.context:,}, so rows with such "
            "are dropped; raise context or lower the tiling's tiles"
        )
    elif largest.tiles > stage.max_tiles:
        yield (
            f"its largest picture is cut into {largest.tiles} tiles and a pack holds {stage.max_tiles}, so rows with such are "
            "dropped; raise max_tiles or lower the tiling's"
        )
    each = layout.tokens(single) / max(1, single.tiles)
    if all(isinstance(source.corpus, TextOnly) for source in stage.mixture) or not each:
        return
    if stage.max_tiles * (each + 16) < 0.5 * stage.context:
        yield (
            f"the tile budget is scarce: {stage.max_tiles} tiles make {stage.max_tiles * each:,.0f} of {stage.context:,} tokens, "
            "so packs of pictures with short texts stay half empty; raise max_tiles"
        )
    longest = recipe.model.words.longest
    if (
        longest is not None
        and stage.context < longest / 8
        and any(isinstance(source.corpus, Interleaved | Obelics) for source in stage.mixture)
    ):
        yield (
            f"pages are cut at {stage.context:,} tokens and the language model reads {longest:,}; what is said of earlier "
            "pictures is lost, raise context if memory allows"
        )


def _ranks(stage: Stage, workers: int) -> Iterator[str]:
    packs = stage.packs_per_step
    if workers > packs:
        yield f"a step has {_packs(packs)} and there are {workers} workers, so {workers - packs} of them do nothing"
    elif packs % workers and packs < 4 * workers:
        idle = -(-packs // workers) * workers - packs
        yield f"a step has {_packs(packs)}, and with {workers} workers {idle} places of its last round are empty"


def _packs(count: int) -> str:
    return f"{count} pack{'s' if count != 1 else ''}"


def _of_all(recipe: Recipe) -> Iterator[str]:
    if not isinstance(recipe.model, VLM):
        return
    last = recipe.stages[-1]
    trained = any(key.split(".")[0] == "lm" for key in last.tune)
    texts = any(isinstance(source.corpus, TextOnly) for source in last.mixture)
    if trained and not texts and len(recipe.stages) > 1:
        yield (
            f"{last.name} trains the language model and reads no text alone; VILA (arXiv:2312.07533, 3.3) found that text skill "
            "falls without"
        )
