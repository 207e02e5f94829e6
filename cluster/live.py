"""What a person sees of a run in the terminal while it goes.

    with Live(run, recipe, console) as live:        on a terminal a display that moves, elsewhere plain lines
        ...

It knows only the run's files, so it can neither slow nor break what it watches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Self

import rich.live
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.amounts import duration, flop_words, quantity, sparkline
from cluster.journal import Decision, Fault, GroupStarted, Journal, PartsDescribed, StageFinished, StageStarted
from cluster.lines import Follower
from cluster.metrics import Evaluation, RunFolder, parse_step
from cluster.summary import COLOURS, MARKS
from cluster.views import RECENT, StageView, paired_probes, paired_scores
from mllm.parts import PartReport
from mllm.recipe import Recipe

PLAIN_SECONDS, PLAIN_SHARE = 5.0, 0.1
"""A plain line is due after so many seconds, or so great a share of the stage."""

NEWS = 2.0
"""Seconds between two looks into the journal, which on S3 is a request each."""

QUIET_SECONDS = 20.0
"""Silence after which the display says how long it has waited."""


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
        self.described: dict[str, tuple[PartReport, ...]] = {}
        self.fault: Exception | None = None
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.follower = threading.Thread(target=self._follow, name="live view", daemon=True)
        self.display = rich.live.Live(
            console=console, get_renderable=self._display, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Self:
        done = {event.stage for event in self.journal.state().finished_stages}  # what is in it already is no news
        told = (event for event in self.journal.known if isinstance(event, PartsDescribed))
        self.described = {event.fingerprint: event.parts for event in told}
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
        self._describe(event.parts or self.described.get(event.fingerprint, ()))

    def stage_finished(self, event: StageFinished, before: Evaluation | None, after: Evaluation | None) -> None:
        """Say what the stage came to, and what changed on held-out sources."""
        with suppress(Exception):  # which the follower meets too
            self._hear(at_once=True)
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

    def _describe(self, parts: Iterable[PartReport]) -> None:
        for part in parts:
            self._line("part", part.line(), "" if part.lr is not None else "dim")

    def _hear(self, at_once: bool = False) -> None:
        """Tell what the stage trains, faults, and what is done about them, as the journal does."""
        if not at_once and time.monotonic() - self.listened < NEWS:
            return
        with self.lock:
            self.listened = time.monotonic()
            known = len(self.journal.known)
            fresh = self.journal.events()[known:]
        for event in fresh:
            if isinstance(event, Fault):
                self._line("fault", f"{event.what.replace('_', ' ')}: {event.detail.splitlines()[0][:200]}", "yellow")
            elif isinstance(event, Decision):
                self._line("decided", f"{event.what.replace('_', ' ')}: {event.why[:200]}", "yellow")
            elif isinstance(event, PartsDescribed):
                self._describe(event.parts)
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
            f"{utilised(view)}wait {view.wait(RECENT):>4.0%}  lr {last.lr:.2e}  eta {duration(view.remaining):>7}",
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


def utilised(view: StageView) -> str:
    """What the last steps computed, as part of a plain line; nothing where it is unknown."""
    mfu = view.mfu(RECENT)
    return "" if mfu is None else f"{flop_words(view.rate('flops', RECENT)):>10}/s  mfu {mfu:>5.1%}  "
