"""What a run would cost: GPU-hours and money, each from its least to its most.

    hours = FLOPs that are computed / (FLOP/s that a GPU reaches) / (share of the time that it computes)

All have their error. FLOPs follow from the stage's tokens and pictures: known where the duration says them, estimated from
published sizes (`cluster.published`) or from a corpus's first rows where it is in epochs. The speed is either assumed -- a share
of the data sheet's peak, 0.35 to 0.45 unless told -- or measured, by another run's own steps. What is computed again to save
memory takes its time as everything else does, so a stage with `recompute` has a lower MFU than the share that was assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import quantiles

from cluster.amounts import quantity
from cluster.metrics import RunFolder
from cluster.mfu import gpu_peak
from cluster.plan import Plan, StagePlan, plan
from cluster.published import Range, published
from cluster.site import Site, SiteError
from mllm.flops import Work
from mllm.objectives import DPO
from mllm.recipe import Epochs, Recipe, Source, Stage, Steps, Tokens
from pipelines.types import spec
from pipelines.windows import PackWindows

SHARES = (0.35, 0.45)
"""Of the data sheet's peak: what tuned trainers of this size reach on text and pictures (MPT-7B on H100: 42 to 46 %)."""

FILL = (0.9, 1.0)
"""Tokens of a step by what its packs could hold."""

GOODPUT = (0.9, 1.0)
"""Share of a run's time that goes into steps that count: the rest is starts, faults and saves, and is paid for (Llama 3,
arXiv:2407.21783, 3.3.4, had more than 90 % on 16,384 GPUs)."""

SETTLING = 3
"""Steps at a stage's beginning that are not looked at: compiling, first reads."""


@spec
class Speed:
    """FLOP/s that one GPU reaches, and where the number is from. `tokens` a second and GPU, where a run has told them."""

    flops: Range
    source: str
    tokens: Range | None = None


@spec
class Shape:
    """A stage's data: all tokens, visual ones counted, tiles, and the documents they lie in; and where each number is from."""

    tokens: Range
    tiles: Range
    documents: float
    sources: tuple[str, ...]


@spec
class StageCost:
    """What a stage costs; `hours` of one GPU. `why` says why nothing is known, where nothing is."""

    name: str
    shape: Shape | None
    flops: Range | None
    hours: Range | None
    why: str = ""


@spec
class RunCost:
    """All stages, at one speed. `price` is for a GPU-hour."""

    stages: tuple[StageCost, ...]
    speed: Speed
    price: float | None = None

    @property
    def known(self) -> tuple[StageCost, ...]:
        """The stages whose cost is known."""
        return tuple(stage for stage in self.stages if stage.hours is not None)

    @property
    def whole(self) -> bool:
        """Whether that is all of them."""
        return len(self.known) == len(self.stages)

    @property
    def hours(self) -> Range:
        """GPU-hours of the stages that are known."""
        found = [stage.hours for stage in self.stages if stage.hours is not None]
        return sum(low for low, _ in found), sum(high for _, high in found)

    @property
    def money(self) -> Range | None:
        """What those cost, where a price was told."""
        return None if self.price is None else (self.price * self.hours[0], self.price * self.hours[1])


def assumed(gpu: str, shares: Range = SHARES) -> Speed:
    """A share of a GPU's peak. Raises ValueError for a GPU that is not known, or shares that are none."""
    peak = gpu_peak(gpu.upper())
    if not peak:
        raise ValueError(
            f"--gpu {gpu}: the peak of such a GPU is not known here; take a100, h100, h200, b200 or --from RUN"
        )
    low, high = shares
    if not 0 < low <= high <= 1:
        raise ValueError(f"--mfu {low:g}-{high:g}: give a share of the peak from its least to its most, as 0.35-0.45")
    return Speed(
        flops=(low * peak, high * peak),
        source=f"assumed: {low:.0%} to {high:.0%} of {gpu.upper()}'s {peak / 1e12:.0f} TFLOP/s (--mfu, --gpu)",
    )


def shares_of(words: str) -> Range:
    """`0.35-0.45`, or one number. Raises ValueError."""
    low, _, high = words.partition("-")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise ValueError(f"--mfu {words}: expected a share or two, as 0.4 or 0.35-0.45") from None


def measured(folder: RunFolder, recipe: Recipe) -> Speed:
    """What a run's own steps reached, waiting included: the tenth and ninetieth percentile over its stages' steps.

    Raises ValueError where it has too few steps, or nobody knew their FLOPs.
    """
    rates: list[float] = []
    tokens: list[float] = []
    for stage in recipe.stages:
        steps = [step for step in folder.steps(stage.name)[SETTLING:] if step.seconds and step.hardware_flops]
        rates += [step.hardware_flops / step.seconds / step.world for step in steps]
        tokens += [step.tokens / step.seconds / step.world for step in steps]
    if len(rates) < 2:
        raise ValueError(
            f"--from {folder.name}: fewer than two of its steps tell FLOPs (the first {SETTLING} of a stage are not looked at); "
            "name a longer run, or a share of the peak with --mfu and --gpu"
        )
    return Speed(
        flops=_spread(rates),
        source=f"measured: {len(rates):,} steps of run {folder.name} (--from)",
        tokens=_spread(tokens),
    )


def _spread(values: Sequence[float]) -> Range:
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def cost(recipe: Recipe, site: Site, speed: Speed, price: float | None = None, made: Plan | None = None) -> RunCost:
    """What a run of `recipe` would cost; `made` is its plan, where there is one already."""
    made = made or plan(recipe, site, ())
    stages = zip(recipe.stages, made.stages, strict=True)
    return RunCost(
        stages=tuple(_stage(recipe, stage, planned, site, speed) for stage, planned in stages),
        speed=speed,
        price=price,
    )


def _stage(recipe: Recipe, stage: Stage, planned: StagePlan, site: Site, speed: Speed) -> StageCost:
    def unknown(why: str) -> StageCost:
        return StageCost(name=stage.name, shape=None, flops=None, hours=None, why=why)

    counted = planned.counted
    if counted is None:
        return unknown(planned.uncounted)
    shape = shape_of(recipe, stage, site)
    if isinstance(shape, str):
        return unknown(shape)
    low, high = (counted.hardware_flops(_work(recipe, shape, end)) for end in (0, 1))
    hours = low / speed.flops[1] / GOODPUT[1] / 3600, high / speed.flops[0] / GOODPUT[0] / 3600
    return StageCost(name=stage.name, shape=shape, flops=(low, high), hours=hours)


def _work(recipe: Recipe, shape: Shape, end: int) -> Work:
    """The stage's work at one end of its range: documents of the mean length, every position learned that holds no picture."""
    tokens, tiles = round(shape.tokens[end]), round(shape.tiles[end])
    visual = min(tokens, tiles * recipe.model.layout(recipe.tiling).tokens_per_tile)
    length = tokens / shape.documents
    return Work(
        tiles=tiles,
        tokens=tokens,
        pairs=round(tokens * (length + 1) / 2),
        learned=tokens - visual,
        shown=round(tokens * tiles / shape.documents),
        documents=round(shape.documents),
    )


def shape_of(recipe: Recipe, stage: Stage, site: Site) -> Shape | str:
    """A stage's tokens, tiles and documents; or why they are not known."""
    rows = [_rows(recipe, stage, source, site) for source in stage.mixture]
    missing = [source.corpus.name for source, found in zip(stage.mixture, rows, strict=True) if found is None]
    if missing:
        return (
            f"how large {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} is not known here; put it on the site, or "
            f"""say how long the stage is: -s stages.{stage.name}.duration='{{"kind":"tokens","count":1000000000}}'"""
        )
    found = [row for row in rows if row is not None]
    shape = _once(stage, found)
    match stage.duration:
        case Epochs(count=count):
            return _times(shape, count, count)
        case Tokens(count=count):
            return _of_tokens(shape, (count, count), f"{count:,} tokens, as the recipe says")
        case Steps(count=count):
            whole = count * stage.packs_per_step * stage.context
            return _of_tokens(
                shape, (FILL[0] * whole, FILL[1] * whole), f"{count:,} steps of {stage.tokens_per_step:,} tokens"
            )


@spec
class Rows:
    """A source's rows: how many, and the mean tokens and tiles of one."""

    rows: Range
    tokens: Range
    tiles: Range
    source: str


def _rows(recipe: Recipe, stage: Stage, source: Source, site: Site) -> Rows | None:
    """What is known of a source: its own first rows, where it is on the site; else what is published of it."""
    corpus = source.corpus
    if corpus.name in site.corpora:
        try:
            return _looked_at(recipe, stage, source, site)
        except SiteError:
            return None
    told = published(corpus.name)
    if told is None:
        return None
    layout = recipe.model.layout(recipe.tiling)
    cut = recipe.tiling.cut(recipe.tiling.size, recipe.tiling.size, limit=recipe.tiling.share(1))
    each = layout.tokens(cut)
    most = getattr(corpus, "max_images", None) or told.pictures[1]
    pictures = (min(told.pictures[0], most), min(told.pictures[1], most))
    return Rows(
        rows=told.rows,
        tokens=(told.text[0] + each * pictures[0], told.text[1] + each * pictures[1]),
        tiles=(cut.tiles * pictures[0], cut.tiles * pictures[1]),
        source=f"{corpus.name}: {told.source}",
    )


def _looked_at(recipe: Recipe, stage: Stage, source: Source, site: Site) -> Rows | None:
    """By the source's first window of rows, headers and text alone."""
    single = replace(stage, mixture=(replace(source, weight=None),), annotators=(), sampling=None)
    stream = site.stream(recipe, single)
    windows = PackWindows(stream)
    samples, _ = windows.samples(windows.rows(0))
    if not samples or not stream.order.rows:
        return None
    read = max(1, stream.order.window(0).rows)
    tokens = sum(len(sample.input_ids) for sample in samples) / read
    tiles = sum(sample.tiles for sample in samples) / read
    rows = float(stream.order.rows)
    wide = 0.9, 1.1  # a window is some hundred rows
    return Rows(
        rows=(rows, rows),
        tokens=(wide[0] * tokens, wide[1] * tokens),
        tiles=(wide[0] * tiles, wide[1] * tiles),
        source=f"{source.corpus.name}: the site's {int(rows):,} rows, by the first {read}",
    )


def _once(stage: Stage, found: Sequence[Rows]) -> Shape:
    """One pass over the mixture: all rows of sources without weights; with weights as many as meet them."""
    weights = [source.weight for source in stage.mixture]
    shares = [1.0] * len(found)
    if any(weight is not None for weight in weights):
        total = sum(rows.rows[1] for rows in found)
        heavy = sum(weight or 0.0 for weight in weights) or 1.0
        shares = [total * (weight or 0.0) / heavy / rows.rows[1] for weight, rows in zip(weights, found, strict=True)]
    parts = list(zip(shares, found, strict=True))

    def tokens(end: int) -> float:
        return sum(share * rows.rows[end] * rows.tokens[end] for share, rows in parts)

    def tiles(end: int) -> float:
        return sum(share * rows.rows[end] * rows.tiles[end] for share, rows in parts)

    answers = 2 if isinstance(stage.objective, DPO) else 1  # of a row, a document each
    return Shape(
        tokens=(tokens(0), tokens(1)),
        tiles=(tiles(0), tiles(1)),
        documents=max(1.0, answers * sum(share * sum(rows.rows) / 2 for share, rows in parts)),
        sources=tuple(rows.source for rows in found),
    )


def _times(shape: Shape, low: float, high: float) -> Shape:
    return replace(
        shape,
        tokens=(low * shape.tokens[0], high * shape.tokens[1]),
        tiles=(low * shape.tiles[0], high * shape.tiles[1]),
        documents=max(1.0, (low + high) / 2 * shape.documents),
    )


def _of_tokens(shape: Shape, tokens: Range, source: str) -> Shape:
    """The same rows, as many as hold `tokens` between them."""
    low, high = tokens[0] / shape.tokens[0], tokens[1] / shape.tokens[1]
    told = _times(shape, low, high)
    return replace(told, sources=(source, *shape.sources))


def hours_words(hours: Range) -> str:
    """`3.6k to 5.1k GPU-hours`."""
    return f"{quantity(hours[0])} to {quantity(hours[1])} GPU-hours"


def lines(run: RunCost, worlds: Sequence[int]) -> list[str]:
    """What a person reads of it."""
    out = [f"cost by {run.speed.source}"]
    if run.speed.tokens is not None:
        out.append(f"  {run.speed.tokens[0]:,.0f} to {run.speed.tokens[1]:,.0f} tokens a second and worker there")
    for stage in run.stages:
        if stage.hours is None or stage.shape is None:
            out.append(f"  {stage.name}: not known: {stage.why}")
            continue
        tokens = stage.shape.tokens
        out.append(
            f"  {stage.name}: {hours_words(stage.hours)} for {tokens[0] / 1e9:.3g} to {tokens[1] / 1e9:.3g} billion tokens"
        )
        out += [f"      {source}" for source in stage.shape.sources]
    if not run.known:
        return out
    whole = "in all" if run.whole else "without the stages that are not known"
    money = ""
    if run.money is not None:
        least, most = (f"{each:,.0f}" if each >= 10 else f"{each:.2g}" for each in run.money)
        money = f", {least} to {most} at {run.price:g} an hour"
    out.append(f"  {hours_words(run.hours)} {whole}{money}")
    for world in worlds:
        low, high = run.hours[0] / world, run.hours[1] / world
        long = f"{low / 24:.1f} to {high / 24:.1f} days" if high >= 48 else f"{low:.2g} to {high:.2g} hours"
        out.append(f"  on {world} GPUs {long}")
    return out
