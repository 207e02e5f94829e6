"""What a person sees of a run in the terminal: a view that follows it, and a summary at its end.

    with Live(run, recipe, console) as live:        on a terminal a display that moves, elsewhere plain lines
        ...
    console.print(summary(run, recipe, state))      one row a stage, then held-out losses and dropped rows

Both know only the run's files, so the view can neither slow nor break what it watches.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Self

import rich.live
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.journal import Decision, Fault, GroupStarted, Journal, RunState, StageFinished, StageStarted
from cluster.lines import Follower
from cluster.metrics import Evaluation, RunFolder, StepRecord, parse_step, utilisation
from mllm.evaluate import ProbeScore, SourceScore
from mllm.recipe import Recipe

Standing = Literal["done", "running", "stopped", "failed", "waiting"]

MARKS: dict[Standing, str] = {"done": "✓", "running": "●", "stopped": "■", "failed": "✗", "waiting": "○"}
COLOURS: dict[Standing, str] = {
    "done": "green",
    "running": "bold cyan",
    "stopped": "bold yellow",
    "failed": "bold red",
    "waiting": "dim",
}

RECENT = 10
"""Steps over which rates are averaged."""

PLAIN_SECONDS, PLAIN_SHARE = 5.0, 0.1
"""A plain line is due after so many seconds, or so great a share of the stage."""

NEWS = 2.0
"""Seconds between two looks into the journal, which on S3 is a request each."""

QUIET_SECONDS = 20.0
"""Silence after which the display says how long it has waited."""


@dataclass(slots=True)
class StageView:
    """All that a run's files tell of one stage."""

    name: str
    standing: Standing = "waiting"
    started: StageStarted | None = None
    finished: StageFinished | None = None
    steps: list[StepRecord] = field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None
    during: list[Evaluation] = field(default_factory=list)

    @property
    def last(self) -> StepRecord | None:
        return self.steps[-1] if self.steps else None

    @property
    def total(self) -> int | None:
        """Steps of the stage: as planned, or estimated from progress."""
        if self.started and self.started.steps:
            return self.started.steps
        return round(self.last.step / self.last.progress) if self.last and self.last.progress > 0 else None

    @property
    def total_words(self) -> str:
        """`60`, or `~60` where it is an estimate."""
        planned = self.standing == "done" or (self.started and self.started.steps)
        return "?" if self.total is None else f"{'' if planned else '~'}{self.total:,}"

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    @property
    def images(self) -> int:
        return sum(step.images for step in self.steps)

    @property
    def seconds(self) -> float:
        """Time spent in steps; evaluations and checkpoints come on top."""
        return sum(step.seconds for step in self.steps)

    @property
    def dropped(self) -> Counter[str]:
        """Rows dropped, by reason."""
        reasons: Counter[str] = Counter()
        for step in self.steps:
            reasons.update(step.reasons)
        return reasons

    def rate(self, what: Literal["tokens", "images", "flops"], last: int | None = None) -> float:
        """`what` a second, over the `last` steps or all of them."""
        steps = self.steps if last is None else self.steps[-last:]
        seconds = sum(step.seconds for step in steps)
        return sum(getattr(step, what) for step in steps) / seconds if seconds else 0.0

    def mfu(self, last: int | None = None) -> float | None:
        """Share of what the devices could compute that went into the model, waiting included; None where it is unknown."""
        return utilisation(self.steps if last is None else self.steps[-last:])

    def wait(self, last: int | None = None) -> float:
        """Share of the time spent waiting for data."""
        steps = self.steps if last is None else self.steps[-last:]
        seconds = sum(step.seconds for step in steps)
        return sum(step.data_wait for step in steps) / seconds if seconds else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds to the stage's end at the pace of its last steps."""
        steps = self.steps[-5 * RECENT :]
        gained = steps[-1].progress - steps[0].progress if steps else 0.0
        if gained <= 0:
            return None
        return (1 - steps[-1].progress) * sum(step.seconds for step in steps[1:]) / gained

    def add(self, record: StepRecord) -> None:
        """Append a step; one that was trained again after a crash replaces what it undid."""
        while self.steps and self.steps[-1].step >= record.step:
            self.steps.pop()
        self.steps.append(record)


def stage_views(run: RunFolder, recipe: Recipe, state: RunState) -> list[StageView]:
    """The recipe's stages, in order, as far as the run has got with them."""
    started = {event.stage: event for event in state.started_stages}
    finished = {event.stage: event for event in state.finished_stages}
    word = run_standing(state)
    current: Standing = word if word in ("failed", "stopped") else "running"
    views = []
    for name in (stage.name for stage in recipe.stages):
        standing: Standing = "done" if name in finished else current if name == state.stage else "waiting"
        views.append(
            StageView(
                name=name,
                standing=standing,
                started=started.get(name),
                finished=finished.get(name),
                steps=run.steps(name),
                before=run.evaluation(name, "before"),
                after=run.evaluation(name, "after"),
                during=run.evaluations(name),
            )
        )
    return views


def borders(views: Sequence[StageView]) -> list[tuple[str, Evaluation]]:
    """The evaluations through the curriculum: before it, during each stage and after it, which is before the next one."""
    first = next((view.before for view in views if view.before), None)
    found = [("before training", first)] if first else []
    for view in views:
        found += [(f"{view.name}, step {each.step:,}", each) for each in view.during if each.step is not None]
        found += [(f"after {view.name}", view.after)] if view.after else []
    return found


def paired_scores(
    before: Evaluation | None, after: Evaluation | None
) -> list[tuple[str, SourceScore | None, SourceScore | None]]:
    """Each held-out source with its score on either side of a stage."""
    old = {score.source: score for score in before.scores} if before else {}
    new = {score.source: score for score in after.scores} if after else {}
    return [(source, old.get(source), new.get(source)) for source in {**old, **new}]


def paired_probes(
    before: Evaluation | None, after: Evaluation | None
) -> list[tuple[int, ProbeScore | None, ProbeScore | None]]:
    """The same for each number of shots; a probe that asked nothing is left out."""
    old = {score.shots: score for score in before.probe if score.questions} if before else {}
    new = {score.shots: score for score in after.probe if score.questions} if after else {}
    return [(shots, old.get(shots), new.get(shots)) for shots in {**old, **new}]


class Live:
    """Follows a run's files from a thread of its own and shows how it goes.

    `poll` is the seconds between looks, `clock` what tells the time. A fault in the view ends the view, not the run:
    it is told in one line at the end.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        console: Console,
        poll: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run = run
        self.console = console
        self.poll = poll
        self.clock = clock
        self.views = [StageView(name=stage.name) for stage in recipe.stages]
        self.width = max(len(view.name) for view in self.views)
        self.arrow = "→" if console.is_terminal else "->"
        self.view: StageView | None = None
        self.tail: Follower | None = None
        self.heard = self.told = clock()
        self.told_progress = 0.0
        self.journal = Journal(run.root)
        self.listened = time.monotonic()
        self.fault: Exception | None = None
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.follower = threading.Thread(target=self._follow, name="live view", daemon=True)
        self.display = rich.live.Live(
            console=console, get_renderable=self._display, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Self:
        done = {event.stage for event in self.journal.state().finished_stages}  # what is in it already is no news
        for view in self.views:
            view.standing = "done" if view.name in done else "waiting"
        if self.console.is_terminal:
            self.display.start()
        self.follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.follower.join(timeout=5)
        if self.console.is_terminal:
            self.display.stop()
        if self.fault:
            self.say(f"the live view stopped early ({type(self.fault).__name__}: {self.fault}); the run did not")

    def say(self, text: str | Text) -> None:
        """Print a line above the display."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage_started(self, event: StageStarted) -> None:
        """Say what the stage trains, and follow its steps from here."""
        with self.lock:
            view = next(view for view in self.views if view.name == event.stage)
            self.view, self.tail = view, Follower(self.run.steps_file(event.stage))
            view.started, view.standing, view.steps = event, "running", []
            self._read()
            self.heard = self.told = self.clock()
            self.told_progress = view.last.progress if view.last else 0.0
        planned = f"{event.steps:,} steps" if event.steps else "to the end of its data"
        resumed = f", from a checkpoint near step {view.last.step:,}" if view.last else ""
        self._line("start", f"{planned}{resumed}")
        for part in event.parts:
            self._line("part", part.line(), "" if part.lr is not None else "dim")

    def stage_finished(self, event: StageFinished, before: Evaluation | None, after: Evaluation | None) -> None:
        """Say what the stage came to, and what changed on held-out sources."""
        with self.lock:
            view = next(view for view in self.views if view.name == event.stage)
            self._read()
            view.finished, view.standing = event, "done"
            view.before, view.after = before, after
            self.view = self.tail = None
        loss = f", loss {view.steps[0].loss:.4f} {self.arrow} {view.steps[-1].loss:.4f}" if view.steps else ""
        left = sum(not step.taken for step in view.steps)
        loss += f", {left:,} steps not taken for having no finite gradient" if left else ""
        came_to = f"{len(view.steps):,} steps, {quantity(view.tokens)} tokens in {duration(view.seconds)}{loss}"
        self._line("done", came_to, stage=view.name)
        scores = paired_scores(before, after)
        names = max((len(source) for source, _, _ in scores), default=0)
        for source, old, new in scores:
            if new is None:
                continue
            loss = self._change(old and old.loss, new.loss, 4)
            accuracy = self._change(old and 100 * old.accuracy, 100 * new.accuracy, 1, "%")
            style = "" if old is None else "green" if new.loss < old.loss else "yellow"
            self._line("held-out", f"{source:<{names}}  loss {loss}  accuracy {accuracy}", style, view.name)
        for shots, old, new in paired_probes(before, after):
            if new is not None:
                right = self._change(old and 100 * old.accuracy, 100 * new.accuracy, 1, "%")
                chance = f"chance {100 / new.choices:.0f}% of {new.questions:,}"
                self._line("probe", f"{shots}-shot  right {right}  {chance}", stage=view.name)

    def _change(self, before: float | None, after: float, digits: int, unit: str = "") -> str:
        if before is None:
            return f"{after:.{digits}f}{unit}"
        return f"{before:.{digits}f}{unit} {self.arrow} {after:.{digits}f}{unit} ({after - before:+.{digits}f})"

    def _line(self, what: str, words: str, style: str = "", stage: str | None = None) -> None:
        name = stage or (self.view.name if self.view else "")
        self.say(Text.assemble((f"{name:<{self.width}}", "bold"), "  ", (f"{what:<8}", "dim"), "  ", (words, style)))

    def _follow(self) -> None:
        while not self.over.wait(self.poll):
            try:
                with self.lock:
                    fresh = self._read()
                self._hear()
                if fresh and not self.console.is_terminal:
                    self._tell()
            except Exception as error:
                self.fault = error
                return

    def _hear(self) -> None:
        """Tell faults, and what is done about them, as the journal does."""
        if time.monotonic() - self.listened < NEWS:
            return
        self.listened = time.monotonic()
        known = len(self.journal.known)
        for event in self.journal.events()[known:]:
            if isinstance(event, Fault):
                self._line("fault", f"{event.what.replace('_', ' ')}: {event.detail.splitlines()[0][:200]}", "yellow")
            elif isinstance(event, Decision):
                self._line("decided", f"{event.what.replace('_', ' ')}: {event.why[:200]}", "yellow")
            elif isinstance(event, GroupStarted) and event.step:
                self._line("workers", f"{event.world:,} begin after step {event.step:,}", "dim")

    def _read(self) -> bool:
        """Take in the steps written since the last look; whether there were any."""
        try:
            records = [r for line in self.tail.read() if (r := parse_step(line))] if self.tail else []
        except Exception as error:
            self.fault, self.tail, records = error, None, []
        for record in records:
            if self.view:
                self.view.add(record)
        if records:
            self.heard = self.clock()
        return bool(records)

    def _tell(self) -> None:
        """One plain line, when one is due."""
        view = self.view
        if view is None or view.last is None:
            return
        last, now = view.last, self.clock()
        if now - self.told < PLAIN_SECONDS and last.progress - self.told_progress < PLAIN_SHARE:
            return
        self.told, self.told_progress = now, last.progress
        self._line(
            "step",
            f"{last.step:>6,} of {view.total_words:>6} {last.progress:>4.0%}  loss {last.loss:8.4f}  "
            f"{quantity(view.rate('tokens', RECENT)):>6} tokens/s  {quantity(view.rate('images', RECENT)):>6} images/s  "
            f"{_utilised(view)}wait {view.wait(RECENT):>4.0%}  lr {last.lr:.2e}  eta {duration(view.remaining):>7}",
        )

    def _display(self) -> RenderableType:
        with suppress(Exception), self.lock:  # rich would raise it where the trainer prints its next line
            return self._picture()
        return Text("")

    def _picture(self) -> RenderableType:
        stages = Text("   ").join(
            Text(f"{MARKS[view.standing]} {view.name}", style=COLOURS[view.standing]) for view in self.views
        )
        view = self.view
        if view is None:
            return Group(Text(""), stages)
        if view.last is None:
            silence = f"starting workers, reading the first packs, {duration(self.clock() - self.heard)}"
            return Group(Text(""), stages, Text(silence, style="dim"))
        last = view.last
        bar = Table.grid(padding=(0, 2, 0, 0), expand=False)
        bar.add_row(
            ProgressBar(
                total=1.0,
                completed=last.progress,
                width=min(40, self.console.width // 3),
                complete_style="cyan",
                finished_style="green",
            ),
            Text(f"step {last.step:,} of {view.total_words}"),
            Text(f"{last.progress:.0%}", style="bold"),
            Text(self._expectation(view), style="dim"),
        )
        losses = sparkline([step.loss for step in view.steps if step.taken])
        mfu = view.mfu(RECENT)
        utilised = Text.assemble(
            (f"{flop_words(view.rate('flops', RECENT))}/s ", "bold"), ("MFU ", "dim"), (f"{mfu or 0:.1%}", "bold")
        )
        figures = Text("   ").join(
            [
                Text.assemble(("loss ", "dim"), (f"{last.loss:.4f} ", "bold"), (losses, "cyan")),
                Text.assemble((quantity(view.rate("tokens", RECENT)), "bold"), (" tokens/s", "dim")),
                Text.assemble((quantity(view.rate("images", RECENT)), "bold"), (" images/s", "dim")),
                *([] if mfu is None else [utilised]),
                Text.assemble(("wait ", "dim"), (f"{view.wait(RECENT):.0%}", "bold")),
                Text.assemble(("lr ", "dim"), (f"{last.lr:.2e}", "bold")),
            ]
        )
        return Group(Text(""), stages, bar, figures)

    def _expectation(self, view: StageView) -> str:
        silent = self.clock() - self.heard
        if view.last and view.last.progress >= 1:
            return f"saving and evaluating, {duration(silent)}"
        if silent > QUIET_SECONDS and view.last and silent > 5 * view.last.seconds:
            return f"nothing heard for {duration(silent)}"
        return "" if view.remaining is None else f"eta {duration(view.remaining)}"


def _utilised(view: StageView) -> str:
    """What the last steps computed, as part of a plain line; nothing where it is unknown."""
    mfu = view.mfu(RECENT)
    return "" if mfu is None else f"{flop_words(view.rate('flops', RECENT)):>10}/s  mfu {mfu:>5.1%}  "


def summary(run: RunFolder, recipe: Recipe, state: RunState, now: float | None = None) -> RenderableType:
    """A run in a few lines: its stages, held-out losses through the curriculum, and the rows that were dropped.

    A run that was killed cannot say so; of one that is not over, the time since its last step (until `now`) is told.
    """
    views = stage_views(run, recipe, state)
    latest = max((view.last.time for view in views if view.last), default=None)
    silence = None if latest is None else (time.time() if now is None else now) - latest
    parts: list[RenderableType] = [_heading(run, state, silence), Text(""), _stage_table(views)]
    evaluations = borders(views)
    if evaluations:
        parts += [Text(""), _held_out_table(evaluations)]
    dropped = sum((view.dropped for view in views), Counter[str]())
    if dropped:
        parts += [Text(""), Text(f"{dropped.total():,} rows dropped", style="dim")]
        parts += [Text(f"{count:>8,}  {reason}") for reason, count in dropped.most_common()]
    return Group(*parts, *_gates(state), *_faults(state), Text(""))


def _gates(state: RunState) -> Iterator[RenderableType]:
    """The last judgement of each gate: what it looked at, and whether the stage behind it may begin."""
    latest = {(event.stage, event.gate.partition(", after step")[0]): event for event in state.gates}
    if latest:
        yield Text("")
    for event in latest.values():
        word = Text("open", style="green") if event.open else Text("closed", style="yellow")
        yield Text.assemble(f"entry of {event.stage}: ", word, f", {event.value:.4g} ({event.gate})")


TOLD = 8
"""Faults and decisions of a run that its summary tells, the latest."""


def _faults(state: RunState) -> Iterator[RenderableType]:
    """What went wrong and what was done about it; nothing where nothing did."""
    again = Counter(group.stage for group in state.groups)
    restarts = sum(count - 1 for count in again.values())
    if not state.faults and not restarts:
        return
    kinds = Counter(fault.what.replace("_", " ") for fault in state.faults)
    words = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    yield Text("")
    yield Text(
        f"{restarts:,} restart{'' if restarts == 1 else 's'}" + (f"; faults: {words}" if words else ""), style="dim"
    )
    for event in sorted((*state.faults, *state.decisions), key=lambda event: event.time)[-TOLD:]:
        moment = time.strftime("%m-%d %H:%M:%S", time.localtime(event.time))
        what = event.what.replace("_", " ")
        if isinstance(event, Fault):
            step = f" after step {event.step}" if event.step >= 0 else ""
            yield Text(f"  {moment}  {event.stage}{step}: {what}: {event.detail.splitlines()[0][:160]}")
        else:
            yield Text(f"  {moment}    -> {what}: {event.why[:160]}")


def run_standing(state: RunState) -> Literal["finished", "stopped", "failed", "running", "not started"]:
    """The run in a word. `stopped` is by a person's hand; one that was killed still says `running`."""
    if state.finished:
        return "finished"
    if state.stopped:
        return "stopped"
    if state.failure:
        return "failed"
    return "running" if state.starts else "not started"


def _heading(run: RunFolder, state: RunState, silence: float | None) -> Text:
    word = run_standing(state)
    style = {"finished": "bold green", "failed": "bold red", "stopped": "bold yellow"}.get(word, "bold cyan")
    more = f": {state.failure}" if word == "failed" else f" by {state.stopped}" if word == "stopped" else ""
    if word == "running" and silence is not None:
        more = f", last step {duration(silence)} ago"
    return Text.assemble((run.name, "bold"), "  ", (word, style), more)


def _stage_table(views: Iterable[StageView]) -> Table:
    table = _table("stage", "", "steps", "tokens", "loss", "time", "tokens/s")
    for view in views:
        words: list[str] = [""] * 5
        if view.last:
            steps = f"{len(view.steps):,}" + ("" if view.standing == "done" else f" of {view.total_words}")
            loss = f"{view.steps[0].loss:.3f} → {view.last.loss:.3f}"
            words = [steps, quantity(view.tokens), loss, duration(view.seconds), quantity(view.rate("tokens"))]
        mark = Text(f"{MARKS[view.standing]} {view.standing}", style=COLOURS[view.standing])
        table.add_row(view.name, mark, *words)
    return table


def _held_out_table(evaluations: list[tuple[str, Evaluation]]) -> Table:
    """Held-out loss, one row a source and one column a border: each stage's before stands left of its after."""
    table = _table("held-out loss", *(label for label, _ in evaluations))
    losses = [{score.source: score.loss for score in evaluation.scores} for _, evaluation in evaluations]
    for source in {source: None for column in losses for source in column}:
        cells = []
        for number, column in enumerate(losses):
            old, new = losses[number - 1].get(source) if number else None, column.get(source)
            style = "" if old is None or new is None else "green" if new < old else "yellow"
            cells.append(Text("" if new is None else f"{new:.3f}", style=style))
        table.add_row(source, *cells)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or not column else "right", no_wrap=True)
    return table


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """`values` as a row of at most `width` blocks, each the mean of its share of them."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span)] for mean in means)


def quantity(value: float) -> str:
    """Three digits and a letter: `998`, `12.3k`, `1.24M`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def flop_words(value: float) -> str:
    """Three digits and the unit: `312 TFLOP`, `1.21 EFLOP`."""
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {letter}FLOP"
    return f"{value:.3g} FLOP"


def duration(seconds: float | None) -> str:
    """`0:42`, `1:03:20`, `2d 03:10`; a dash for the unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
