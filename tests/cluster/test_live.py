"""The live view and the summary, as they come out of a console."""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from invented import NOON, evaluation, invented_run, stage_finished, stage_started, step
from rich.console import Console

from cluster import live as live_room
from cluster.amounts import duration, quantity, sparkline
from cluster.journal import Decision, Fault, GateJudged, GroupStarted, Journal, PartsDescribed, RunState
from cluster.lines import Follower
from cluster.live import Live
from cluster.metrics import RunFolder, When
from cluster.summary import summary
from mllm.evaluate import SourceScore
from mllm.recipe import Recipe


class Screen(Console):
    """A console whose output can be read again."""

    def __init__(self, terminal: bool) -> None:
        self.paper = io.StringIO()
        super().__init__(
            file=self.paper, force_terminal=terminal, width=100, color_system="standard" if terminal else None
        )

    @property
    def text(self) -> str:
        return self.paper.getvalue()

    def wait_for(self, words: str) -> None:
        patience = time.monotonic() + 5
        while words not in self.text:
            assert time.monotonic() < patience, f"{words!r} never came; the screen shows\n{self.text}"
            time.sleep(0.01)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def plain() -> Screen:
    return Screen(terminal=False)


def test_plain_lines_can_be_grepped(run: RunFolder, recipe: Recipe, plain: Screen) -> None:
    with Live(run, recipe, plain, poll=0.01) as live:
        live.stage_started(stage_started("align", 20))
        for number in (4, 8):
            run.write_step("align", step(number, 20))
            plain.wait_for(f"{number} of")
        live.say("[note] kept as it is")
        live.stage_finished(stage_finished("align"), evaluation("align", "before", 7), evaluation("align", "after", 6))
    lines = plain.text.splitlines()
    assert "\x1b" not in plain.text
    assert [line.split()[1] for line in lines if line.startswith("align")] == [
        "start", "part", "part", "part", "step", "step", "done", "held-out", "held-out", "probe", "probe",
    ]  # fmt: skip
    steps = [line for line in lines if re.search(r"^align +step ", line)]
    assert len({line.index("loss") for line in steps}) == 1, "columns are aligned"
    assert re.search(r"4 of +20 +20%  loss +\d\.\d{4} +4k tokens/s +24 images/s  wait +4%", steps[0])
    assert "[note] kept as it is" in lines
    assert any("connector           61,824 parameters, trained at lr 0.005" in line for line in lines)
    assert any("pairs-heldout  loss 7.0000 -> 6.0000 (-1.0000)" in line for line in lines)
    assert any("4-shot  right 50.0% -> 50.0% (+0.0)  chance 25% of 24" in line for line in lines)


def test_what_is_trained_is_told_once_workers_know(
    run: RunFolder, recipe: Recipe, plain: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first group of a stage, which builds the model; to who goes on with the stage at once, from the journal."""
    monkeypatch.setattr(live_room, "NEWS", 0.0)
    started = stage_started("align", 20)
    silent = replace(started, parts=())
    told = PartsDescribed(time=NOON, stage="align", fingerprint=started.fingerprint, parts=started.parts)
    with Live(run, recipe, plain, poll=0.01) as live:
        live.stage_started(silent)
        assert "61,824 parameters" not in plain.text
        Journal(run.root).append(told)
        plain.wait_for("align     part      connector           61,824 parameters, trained at lr 0.005")
    resumed = Screen(terminal=False)
    with Live(run, recipe, resumed, poll=60) as live:
        live.stage_started(silent)
        assert "connector           61,824 parameters, trained at lr 0.005" in resumed.text


def test_plain_lines_are_few(run: RunFolder, recipe: Recipe, plain: Screen) -> None:
    """Neither five seconds nor a tenth of the stage: no line."""
    now = [0.0]
    with Live(run, recipe, plain, poll=0.01, clock=lambda: now[0]) as live:
        live.stage_started(stage_started("align", 1000))
        for number in range(1, 6):
            run.write_step("align", step(number, 1000))
            time.sleep(0.03)
        assert "step" not in [line.split()[1] for line in plain.text.splitlines()]
        now[0] = 6.0
        run.write_step("align", step(6, 1000))
        plain.wait_for("6 of  1,000")


def test_resumed_stage_is_not_told_again(run: RunFolder, recipe: Recipe, plain: Screen) -> None:
    for number in range(1, 11):
        run.write_step("align", step(number, 20))
    with Live(run, recipe, plain, poll=0.01) as live:
        live.stage_started(stage_started("align", 20))
        plain.wait_for("from a checkpoint near step 10")
        run.write_step("align", step(9, 20))  # trained again: steps 9 and 10 were after the checkpoint
        run.write_step("align", step(14, 20))
        plain.wait_for("14 of")
        live.stage_finished(stage_finished("align"), None, None)
    assert "10 steps, 20k tokens in 0:05" in plain.text, "eight steps before, nine and fourteen after"


def test_total_is_estimated_where_only_the_data_can_tell(run: RunFolder, recipe: Recipe, plain: Screen) -> None:
    with Live(run, recipe, plain, poll=0.01) as live:
        live.stage_started(stage_started("align", None))
        run.write_step("align", step(10, 40))
        plain.wait_for("10 of    ~40  25%")
    assert "~40" in plain.text


def test_terminal_shows_stages_bar_and_figures(run: RunFolder, recipe: Recipe) -> None:
    screen = Screen(terminal=True)
    with Live(run, recipe, screen, poll=0.01) as live:
        live.stage_started(stage_started("align", 20))
        screen.wait_for("starting workers")
        for number in range(1, 11):
            run.write_step("align", step(number, 20))
        screen.wait_for("step 10 of 20")
        for words in ("● align", "○ sft", "50%", "█", "tokens/s", "eta"):
            assert words in screen.text
        run.write_step("align", step(20, 20))
        screen.wait_for("saving and evaluating")


def test_fault_in_the_view_does_not_reach_the_run(
    run: RunFolder, recipe: Recipe, plain: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Follower) -> list[bytes]:
        raise OSError("stale file handle")

    monkeypatch.setattr(Follower, "read", broken)
    with Live(run, recipe, plain, poll=0.01) as live:
        live.stage_started(stage_started("align", 20))
        live.stage_finished(stage_finished("align"), None, None)
    assert "the live view stopped early (OSError: stale file handle); the run did not" in plain.text


def test_summary_tells_stages_losses_and_drops(tmp_path: Path, recipe: Recipe, plain: Screen) -> None:
    run, state = invented_run(tmp_path / "night-shift", recipe, "failed")
    plain.print(summary(run, recipe, state))
    assert "night-shift  failed: stage 'pretrain': shard <a.tar> is gone" in plain.text
    assert re.search(r"align +✓ done +40 +80k +6\.\d+ → 4\.\d+ +0:20 +4k", plain.text)
    assert re.search(r"pretrain +✗ failed +20 of 40", plain.text)
    assert re.search(r"sft +○ waiting", plain.text)
    assert re.search(r"before +after\nheld-out loss +training +align\n *pairs-heldout +7\.000 +6\.000", plain.text)
    assert re.search(r"6 rows dropped\n +6  image file is truncated", plain.text)


def test_run_stopped_by_hand_is_not_called_failed(tmp_path: Path, recipe: Recipe, plain: Screen) -> None:
    run, state = invented_run(tmp_path / "night-shift", recipe, "running")
    plain.print(summary(run, recipe, replace(state, failure=None, stopped="Ctrl-C")))
    assert "night-shift  stopped" in plain.text
    assert re.search(r"pretrain +■ stopped", plain.text)


def test_summary_shows_where_a_stage_stands_now_and_not_all_it_has_been_through(
    tmp_path: Path, recipe: Recipe, plain: Screen
) -> None:
    run, state = invented_run(tmp_path / "night", recipe, "running")
    for stage in ("align", "pretrain"):
        for done in (10, 20):
            run.write_evaluation(evaluation(stage, "during", 5.0 + 1 / done, "an orange", done))
    plain.print(summary(run, recipe, state))
    lines = plain.text.splitlines()
    (last,) = [number for number, line in enumerate(lines) if line.startswith("held-out loss")]
    above, below = (re.split(r"  +", line.strip()) for line in lines[last - 1 : last + 1])
    assert (above, below) == (["before", "after", "pretrain,"], ["held-out loss", "training", "align", "step 20"])
    assert "5.050" in plain.text
    assert "5.100" not in plain.text


def test_summary_of_three_stages_fits_an_old_terminal(tmp_path: Path, recipe: Recipe, plain: Screen) -> None:
    run, state = invented_run(tmp_path / "night", recipe, "finished")
    borders: list[tuple[str, When]] = [("align", "before"), ("align", "after"), ("pretrain", "after"), ("sft", "after")]
    for stage, when in borders:
        score = SourceScore(source="example-instructions-heldout", loss=7.0, accuracy=0.5, tokens=900)
        run.write_evaluation(replace(evaluation(stage, when, 7.0), scores=(score,)))
    plain.width = 80
    plain.print(summary(run, recipe, state))
    assert "example-instructions-heldout" in plain.text
    assert "…" not in plain.text


def test_summary_of_an_unfinished_run_tells_its_silence(tmp_path: Path, recipe: Recipe, plain: Screen) -> None:
    run, state = invented_run(tmp_path / "night-shift", recipe, "running")
    plain.print(summary(run, recipe, state, now=NOON + 120 + 75))
    assert "running, last step 1:15 ago" in plain.text


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (998, "998"), (999.9, "1k"), (12_345, "12.3k"), (1.24e6, "1.24M")]
)
def test_quantities(value: float, words: str) -> None:
    assert quantity(value) == words


@pytest.mark.parametrize(("seconds", "words"), [(None, "-"), (42, "0:42"), (3800, "1:03:20"), (184_200, "2d 03:10")])
def test_durations(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_sparkline_falls_with_its_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert len(sparkline([1.0] * 1000)) == 24


def test_a_summary_tells_what_went_wrong_and_what_was_done(run: RunFolder, recipe: Recipe) -> None:
    group = GroupStarted(time=NOON, stage="align", fingerprint="align", world=2, step=0)
    hang = Fault(time=NOON + 5, what="hang", stage="align", step=7, rank=1, detail="rank 1 is stopped\nFile ...")
    then = Decision(time=NOON + 6, what="restart", stage="align", why="rank 1 is ended")
    screen = Screen(terminal=False)
    screen.print(summary(run, recipe, RunState.replay([group, hang, then, group])))
    assert "1 restart; faults: 1 x hang" in screen.text
    assert "align after step 7: hang: rank 1 is stopped" in screen.text
    assert "File ..." not in screen.text
    assert "-> restart: rank 1 is ended" in screen.text
    calm = Screen(terminal=False)
    calm.print(summary(run, recipe, RunState.replay([group])))
    assert "restarts" not in calm.text


def test_a_summary_tells_how_each_gate_was_last_judged(run: RunFolder, recipe: Recipe) -> None:
    def judged(gate: str, value: float, is_open: bool) -> GateJudged:
        return GateJudged(time=NOON, stage="sft", gate=gate, value=value, open=is_open)

    early, late = judged("loss <= 2, after step 5", 3.5, False), judged("loss <= 2, after step 10", 1.9, True)
    screen = Screen(terminal=False)
    screen.print(summary(run, recipe, RunState.replay([early, late, judged("tokens >= 9, after step 10", 8, False)])))
    assert "entry of sft: open, 1.9 (loss <= 2, after step 10)" in screen.text
    assert "entry of sft: closed, 8 (tokens >= 9, after step 10)" in screen.text
    assert "3.5" not in screen.text


def test_faults_are_told_as_they_happen(
    run: RunFolder, recipe: Recipe, plain: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_room, "NEWS", 0.0)
    journal = Journal(run.root)
    journal.append(Fault(time=NOON, what="workers", stage="align", step=3, detail="before this view began"))
    with Live(run, recipe, plain, poll=0.01) as live:
        live.stage_started(stage_started("align", 20))
        journal.append(Fault(time=NOON, what="hang", stage="align", step=7, detail="rank 1 is stopped\nFile x.py"))
        journal.append(Decision(time=NOON, what="restart", stage="align", why="rank 1 is ended"))
        journal.append(GroupStarted(time=NOON, stage="align", fingerprint="align", world=2, step=5))
        plain.wait_for("2 begin after step 5")
    assert "hang: rank 1 is stopped" in plain.text
    assert "restart: rank 1 is ended" in plain.text
    assert "x.py" not in plain.text
    assert "before this view" not in plain.text
