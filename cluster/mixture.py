"""`mllm data stats RECIPE`: what a mixture becomes when it is packed, measured before a model is trained on it.

    a few windows  ->  rows, encoded (no pixel is decoded)  ->  samples by source  ->  packs  ->  shares, fill, hints

Shares of rows are what a recipe says; shares of tokens, and of tokens with loss, are what the model meets. Of a pack's two
budgets one is scarce: it decides how many packs there are, and how full the other may become.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table as Lines

from cluster import indexing
from cluster.amounts import quantity
from cluster.figures import Histogram, Section, StatsPage, Table
from cluster.site import Site, SiteError
from mllm.recipe import Recipe, Stage
from pipelines import packing
from pipelines.types import NOT_LEARNED, Budget, Reason, Sample, spec
from pipelines.windows import PackWindows, Stream

MARGIN = 1.1
"""Room that a proposed tile budget leaves above the mean, since packs differ."""

WASTE = 0.9
"""A pack whose other budget could be filled more than this share better is worth a hint."""

IDLE = 0.5
"""Share of the tile budget below which it is called too large."""


@spec
class SourceShare:
    """One source: shares of the mixture's rows, of its tokens and of its tokens with loss; what a row becomes.

    `epoch` are the rows that one epoch takes, `visual` the share of its tokens that pictures take, `dropped` why rows fell out.
    """

    name: str
    rows: float
    tokens: float
    loss: float
    tokens_per_row: float
    pictures_per_row: float
    tiles_per_row: float
    visual: float
    epoch: int
    read: int
    dropped: dict[Reason, int]


@spec
class Mixed:
    """A stage's mixture as measured over `windows` windows: `fill` is the mean share of each budget that packs hold."""

    stage: str
    tree: str
    windows: int
    rows: int
    sources: tuple[SourceShare, ...]
    budget: Budget
    samples: int
    packs: int
    fill_tokens: float
    fill_tiles: float
    scarce: Literal["tokens", "tiles"]
    ratio: float
    hints: tuple[str, ...]
    lengths: tuple[int, ...]
    tiles: tuple[int, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """What is true of a pack, a line each."""
        other = "tiles" if self.scarce == "tokens" else "tokens"
        decides = (
            f"{self.scarce} {'are the scarce budget' if self.ratio > 1.02 else f'and {other} are about equally scarce'}"
        )
        than = (
            f": the mixture needs {self.ratio:.2f} times more of them than of {other}, in packs"
            if self.ratio > 1.02
            else ""
        )
        return (
            f"{self.samples / self.packs:.1f} samples a pack, expected fill {self.fill_tokens:.1%} of {self.budget.tokens:,} "
            f"tokens and {self.fill_tiles:.1%} of {self.budget.tiles:,} tiles",
            decides + (than if math.isfinite(self.ratio) else ": there are no pictures"),
        )


def write_mixture(recipe: Recipe, site: Site, console: Console, out: Path, sample: int) -> Path:
    """Print how each stage's mixture is packed, write it to the page `out`, and return `out`.

    A stage whose corpora the site lacks is named; raises SiteError when that is true of all of them.
    """
    found: list[Mixed | SiteError] = [_measured(recipe, stage, site, console, sample) for stage in recipe.stages]
    errors = [one for one in found if isinstance(one, SiteError)]
    if len(errors) == len(found):
        raise errors[0]
    for stage, one in zip(recipe.stages, found, strict=True):
        if isinstance(one, SiteError):
            console.print(f"{stage.name}: {one}\n", soft_wrap=True, markup=False)
        else:
            show(one, console)
    written = page(recipe, [one for one in found if isinstance(one, Mixed)]).write(out)
    console.print(f"page: {written}", soft_wrap=True, markup=False)
    return written


def _measured(recipe: Recipe, stage: Stage, site: Site, console: Console, sample: int) -> Mixed | SiteError:
    try:
        corpora = list(dict.fromkeys(source.corpus for source in stage.mixture))
        indexing.index_missing(site, corpora, console, Path(site.cache) / "logs")
        return measure(stage.name, site.stream(recipe, stage), sample)
    except SiteError as error:
        return error


def measure(name: str, stream: Stream, sample: int) -> Mixed:
    """Encode and plan windows of `stream`, about `sample` rows in all and at least one window.

    Annotators are left out: they hold models. Raises ValueError for a sample of no row.
    """
    if sample < 1:
        raise ValueError(f"--sample {sample}: at least one row is read")
    windows = PackWindows(replace(stream, annotators=()))
    read: Counter[int] = Counter()
    dropped: dict[int, Counter[Reason]] = {i: Counter() for i in range(len(stream.corpora))}
    samples: list[Sample] = []
    packs = 0
    batches: list[list[Sample]] = []
    numbers = _numbers(stream, sample)
    for k in numbers:
        chunks = stream.order.window(k).chunks
        for chunk in chunks:
            read[chunk.source] += chunk.stop - chunk.start
        plan = windows.plan(k, windows.rows(k))
        packs += len(plan.groups)
        batches.append([bare(sample) for group in plan.groups for sample in group])
        samples += batches[-1]
        for rejected in plan.dropped:
            dropped[stream.sources.index(rejected.row.corpus)][rejected.reason] += 1
    tokens, tiles = sum(len(s.input_ids) for s in samples), sum(s.tiles for s in samples)
    packs = max(1, packs)
    budget = stream.budget
    need_tokens, need_tiles = tokens / budget.tokens, tiles / budget.tiles
    scarce = "tokens" if need_tokens >= need_tiles else "tiles"
    low, high = sorted((need_tokens, need_tiles))
    return Mixed(
        stage=name,
        tree=stream.order.tree(),
        windows=len(numbers),
        rows=read.total(),
        sources=tuple(_shares(stream, samples, read, dropped)),
        budget=budget,
        samples=len(samples),
        packs=packs,
        fill_tokens=need_tokens / packs,
        fill_tiles=need_tiles / packs,
        scarce=scarce,
        ratio=high / low if low else math.inf,
        hints=tuple(_hints(stream, batches, packs, dropped)),
        lengths=tuple(len(sample.input_ids) for sample in samples),
        tiles=tuple(sample.tiles for sample in samples),
    )


def bare(sample: Sample) -> Sample:
    """The sample without its pictures' files, so that many windows fit in memory: each keeps its cut alone."""
    return replace(sample, pictures=tuple(replace(p, of=replace(p.of, data=b"")) for p in sample.pictures))


def _numbers(stream: Stream, sample: int) -> range:
    """Windows to be measured: the first ones, or spread over the stage where shares move."""
    count = max(1, round(sample / stream.order.window_rows))
    if stream.windows is None:
        return range(count)
    return range(0, stream.windows, max(1, stream.windows // count))[:count]


def _shares(
    stream: Stream, samples: Sequence[Sample], read: Counter[int], dropped: dict[int, Counter[Reason]]
) -> Iterator[SourceShare]:
    tokens: Counter[int] = Counter()
    loss: dict[int, float] = dict.fromkeys(range(len(stream.corpora)), 0.0)
    pictures: Counter[int] = Counter()
    tiles: Counter[int] = Counter()
    visual: Counter[int] = Counter()
    for sample in samples:
        tokens[sample.source] += len(sample.input_ids)
        loss[sample.source] += sample.weight * int((sample.labels != NOT_LEARNED).sum())
        pictures[sample.source] += len(sample.pictures)
        tiles[sample.source] += sample.tiles
        visual[sample.source] += sum(sample.visual)
    for i, name in enumerate(stream.sources):
        rows = max(1, read[i])
        yield SourceShare(
            name=name,
            rows=read[i] / max(1, read.total()),
            tokens=tokens[i] / max(1, tokens.total()),
            loss=loss[i] / (sum(loss.values()) or 1.0),
            tokens_per_row=tokens[i] / rows,
            pictures_per_row=pictures[i] / rows,
            tiles_per_row=tiles[i] / rows,
            visual=visual[i] / max(1, tokens[i]),
            epoch=stream.order.sources[i].rows,
            read=read[i],
            dropped=dict(dropped[i]),
        )


def _hints(
    stream: Stream, batches: Sequence[list[Sample]], packs: int, dropped: dict[int, Counter[Reason]]
) -> Iterator[str]:
    """What should be changed about the tile budget, each tried on these very samples."""
    samples = [sample for batch in batches for sample in batch]
    tokens, tiles = sum(len(s.input_ids) for s in samples), sum(s.tiles for s in samples)
    budget = stream.budget
    too_long = sum(reasons[Reason.IMAGE_TOO_LONG] + reasons[Reason.TOO_LONG] for reasons in dropped.values())
    if too_long:
        yield (
            f"{too_long:,} rows hold what no pack of {budget.tokens:,} tokens and {budget.tiles:,} tiles can: "
            "raise context or max_tiles, or choose a smaller tiling"
        )
    if not tokens or not tiles:
        return
    largest = max(sample.tiles for sample in samples)
    fitting = max(largest, math.ceil(MARGIN * budget.tokens * tiles / tokens))
    need_tokens, need_tiles = tokens / budget.tokens, tiles / budget.tiles
    if need_tokens < WASTE * need_tiles and fitting > budget.tiles:
        count = packed(stream, batches, fitting)
        yield (
            f"tiles are scarce, so that packs hold {need_tokens / packs:.0%} of their tokens: with max_tiles={fitting} these "
            f"samples take {count:,} packs of {need_tokens / count:.0%} in place of {packs:,} (memory for {fitting} tiles a pack)"
        )
    elif need_tiles < IDLE * packs and (lower := _enough(stream, batches, fitting, packs)) is not None:
        count = packed(stream, batches, lower)
        yield (
            f"packs hold {need_tiles / packs:.0%} of their tiles: max_tiles={lower} takes {count:,} packs where "
            f"{budget.tiles} takes {packs:,}, bounds a pack's memory lower and keeps ranks level"
        )


def _enough(stream: Stream, batches: Sequence[list[Sample]], fitting: int, packs: int) -> int | None:
    """A tile budget of at most half the present one that costs next to no packs, `fitting` or somewhat more; or None."""
    tiles = fitting
    while tiles <= stream.budget.tiles // 2:
        if packed(stream, batches, tiles) <= 1.01 * packs:
            return tiles
        tiles += max(1, tiles // 2)
    return None


def packed(stream: Stream, batches: Sequence[list[Sample]], tiles: int) -> int:
    """Packs that the samples of each window take where one may hold so many tiles."""
    budget = replace(stream.budget, tiles=tiles)
    plans = (packing.plan(list(batch), budget, random.Random(0), stream.grouping) for batch in batches)
    return max(1, sum(len(plan) for plan in plans))


# --- what is told -----------------------------------------------------------------------------------------------------

HEAD = ("source", "rows", "tokens", "loss", "tokens/row", "pict./row", "tiles/row", "tokens/epoch")


def _cells(source: SourceShare) -> tuple[str, ...]:
    shares = (f"{share:.1%}" for share in (source.rows, source.tokens, source.loss))
    means = (quantity(mean) for mean in (source.tokens_per_row, source.pictures_per_row, source.tiles_per_row))
    return (source.name, *shares, *means, quantity(source.tokens_per_row * source.epoch))


def _dropped(mixed: Mixed) -> Iterator[str]:
    for source in mixed.sources:
        if source.dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items())
            yield f"{source.name}: {sum(source.dropped.values()):,} of {source.read:,} rows dropped: {reasons}"


def _measure_words(mixed: Mixed) -> str:
    windows = f"{mixed.windows:,} window{'s' if mixed.windows > 1 else ''}"
    return f"measured over {windows}: {mixed.rows:,} rows, {mixed.samples:,} samples, {mixed.packs:,} packs"


def show(mixed: Mixed, console: Console) -> None:
    """Print one stage."""

    def say(words: str) -> None:
        console.print(words, soft_wrap=True, markup=False, emoji=False)

    say(f"{mixed.stage}: {mixed.tree}")
    say(f"  {_measure_words(mixed)}")
    lines = Lines(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(HEAD):
        lines.add_column(
            head.replace("/", "\n/") if "/" in head else head,
            justify="right" if place else "left",
            vertical="bottom",
            no_wrap=bool(place),
            overflow="fold",
        )
    for source in mixed.sources:
        lines.add_row(*_cells(source))
    console.print(lines)
    for words in (*mixed.words, *_dropped(mixed)):
        say(f"  {words}")
    for hint in mixed.hints:
        say(f"  hint: {hint}")
    say("")


def page(recipe: Recipe, stages: Sequence[Mixed]) -> StatsPage:
    """The mixtures as a page."""
    sections = []
    for mixed in stages:
        figures = [Histogram.of("Length", "tokens a sample", mixed.lengths)] if mixed.lengths else []
        if any(mixed.tiles):
            figures.append(Histogram.of("Tiles", "a sample", mixed.tiles))
        rows = tuple((*_cells(source), f"{source.visual:.0%}") for source in mixed.sources)
        table = Table(
            head=(*HEAD, "visual"),
            rows=rows,
            note="Shares of rows, of tokens and of tokens with loss (times loss_weight); visual: its pictures' share of tokens.",
        )
        sections.append(
            Section(
                title=mixed.stage,
                facts=(_measure_words(mixed), *mixed.words, *_dropped(mixed)),
                hints=mixed.hints,
                tables=(table,),
                figures=tuple(figures),
            )
        )
    facts = (f"tiling {recipe.tiling.kind}", "what the mixture of each stage becomes when it is packed")
    return StatsPage(title=recipe.name, facts=facts, numbers=(), sections=tuple(sections))
