"""The report, read as a browser would read it."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from invented import SCRIPT, evaluation, invented_run, step, troubled
from PIL import Image
from pydantic import TypeAdapter

from cluster import quarantine
from cluster.curves import POINTS, Binned, bins, smoothed
from cluster.evidence import Evidence, thumbnail
from cluster.journal import Journal, RunState
from cluster.metrics import RunFolder, StepRecord
from cluster.phases import PHASES
from cluster.report import ANSWERS, spread, write_report
from cluster.site import Site
from mllm.recipe import Recipe
from pipelines.types import Limits


class Page(HTMLParser):
    """Words, headings, table rows, addresses and ids of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.inside: list[str] = []
        self.scripts = 0
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link"):
            self.inside.append(tag)
        self.scripts += tag == "script"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, f"<{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] in ("script", "style"):
            return
        self.words.append(data)
        if {"td", "th"} & set(self.inside):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, first: str) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.rows if row and row[0].strip() == first]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, request: pytest.FixtureRequest) -> Page:
    run, state = invented_run(tmp_path_factory.mktemp("runs") / "night-shift", recipe, request.param)
    return Page(write_report(run, recipe, state).path)


@pytest.mark.parametrize("written", ["finished"], indirect=True)
def test_report_tells_what_the_run_did(written: Page) -> None:
    assert "night-shift finished" in written.text
    assert "2 workers" in written.text
    assert "torch 2.13.0" in written.text
    assert "tokens 240k" in written.text
    for stage in ("align", "pretrain", "sft"):
        assert f"stage-{stage}" in written.ids
        assert f"{stage}-loss" in written.ids


@pytest.mark.parametrize("written", ["finished"], indirect=True)
def test_held_out_changes_carry_their_sign_and_their_meaning(written: Page) -> None:
    better = written.row("pairs-heldout")[0]
    worse = written.row("pages-heldout")[0]
    assert better[1:3] == ["7.000 → 6.000", "−1.000 better"]
    assert worse[1:3] == ["7.000 → 8.000", "+1.000 worse"]
    assert written.row("4-shot")[0][1:4] == ["50 % → 50 %", "10 %", "25 %"]


@pytest.mark.parametrize("written", ["finished"], indirect=True)
def test_parts_drops_and_answers_are_shown(written: Page) -> None:
    assert written.row("encoder")[0] == ["encoder", "–", "896,768", "frozen"]
    assert written.row("connector")[0] == ["connector", "61,824", "–", "0.005"]
    dropped = written.row("image file is truncated")[0]
    assert dropped[1:4] == ["4", "4", "4"]
    assert "example-pairs/00000.tar row 10 ends at <byte> 512" in dropped[4]
    assert written.row("expected")[0] == ["expected", "an orange square"]
    assert written.row("after sft")[-1] == ["after sft", "orange"]
    assert written.row("before training")[-1] == ["before training", "a <b>dog</b>"], "what a model writes is no markup"


def test_what_is_written_as_training_goes_stands_below_its_question(tmp_path: Path, recipe: Recipe) -> None:
    run, state = invented_run(tmp_path / "night", recipe, "running")
    for done in range(2, 21, 2):
        run.write_evaluation(evaluation("pretrain", "during", 5.0, f"orange, {done} {SCRIPT}", done))
    file = write_report(run, recipe, state).path
    page = Page(file)
    assert file.read_text().count("held-out picture: pairs-heldout/00000.tar row 0") == 1, "one question, one picture"
    first = next(number for number, row in enumerate(page.rows) if row[0] == "expected")
    told = [[" ".join(cell.split()) for cell in row] for row in page.rows[first : first + 1 + ANSWERS]]
    assert told[0] == ["expected", "an orange square"]
    assert told[1] == ["pretrain, step 20", f"orange, 20 {SCRIPT}"], "the newest comes first"
    assert told[-1] == ["before training", "a <b>dog</b>"]
    steps = [int(when.removeprefix("pretrain, step ")) for when, _ in told if when.startswith("pretrain")]
    assert steps == sorted(steps, reverse=True)
    assert f"{12 - ANSWERS} answers between these are not shown" in page.text
    assert SCRIPT not in file.read_text()


def test_things_are_spread_from_the_first_to_the_last() -> None:
    assert spread(3, 8) == [0, 1, 2]
    assert spread(8, 8) == list(range(8))
    for count in range(9, 40):
        places = spread(count, 8)
        assert (places[0], places[-1], len(set(places))) == (0, count - 1, 8)


@pytest.mark.parametrize("written", ["finished", "failed"], indirect=True)
def test_page_needs_no_network_and_no_element_twice(written: Page) -> None:
    assert all(address.startswith(("#", "data:")) for address in written.addresses)
    assert len(written.ids) == len(set(written.ids))
    assert written.inside == [], "every element is closed"


@pytest.mark.parametrize("written", ["failed"], indirect=True)
def test_failed_run_says_why_and_shows_the_rest(written: Page) -> None:
    assert "The run failed in stage pretrain stage 'pretrain': shard <a.tar> is gone no retry" in written.text
    assert written.row("pretrain")[0][1:3] == ["failed", "20 of 40"]
    assert "sft waiting Not started yet." in written.text


def test_run_that_has_done_nothing_has_a_report(tmp_path: Path, recipe: Recipe) -> None:
    page = Page(write_report(RunFolder(tmp_path), recipe, RunState()).path)
    assert "not started" in page.text
    assert "No row was dropped." in page.text


def test_long_run_stays_a_small_page(tmp_path: Path, recipe: Recipe) -> None:
    run, state = invented_run(tmp_path / "long", recipe, "failed", steps=1500)
    file = write_report(run, recipe, state).path
    assert file.stat().st_size < 1_500_000
    assert "mean of each 5 steps" in file.read_text()
    steps = re.search(r'"align": \{.*?"step": \[(.*?)\]', file.read_text())
    assert steps
    assert steps[1].split(",")[-1].strip() == "1500", "the curve ends where the stage did"


def test_a_step_that_leapt_is_seen_in_a_run_of_a_hundred_thousand(tmp_path: Path, recipe: Recipe) -> None:
    run, _ = invented_run(tmp_path / "long", recipe, "failed", steps=2)
    leapt = replace(step(77_777, 100_000), loss=987.5, grad_norm=54_321.0)
    plain = dump_step(step(1, 100_000)).split(b'"step":1,', 1)
    lines = [b'"step":%d,'.join(plain) % number for number in range(1, 100_001)]
    lines[77_776] = dump_step(leapt)
    run.steps_file("align").write(b"\n".join(lines) + b"\n")
    file = write_report(run, recipe, Journal(run.root).state()).path
    assert file.stat().st_size < 5 * 2**20
    table = tables(file)["align"]
    assert len(table["step"]) <= POINTS
    assert table["step"][-1] == 100_000
    assert max(table["loss_high"]) == 987.5
    assert max(table["grad_norm_high"]) == 54_321.0
    assert max(table["loss"]) < 15, "the mean hardly tells of it"


def test_what_was_read_of_a_run_is_not_read_again(tmp_path: Path, recipe: Recipe) -> None:
    run, _ = invented_run(tmp_path / "night", recipe, "running")
    run.write_evaluation(evaluation("align", "during", 6.5, "orange", 20))
    before, during = run.steps("align"), run.evaluations("align")
    assert (len(before), len(during)) == (40, 1)
    file = run.steps_file("align").path
    file.write_bytes(b"x" * (file.stat().st_size - 1) + b"\n")  # where nobody looks a second time
    run.write_step("align", step(41, 80))
    run.write_step("align", replace(step(40, 80), loss=1.0))
    run.write_evaluation(evaluation("align", "during", 6.0, "an orange", 1_000_000))
    run.write_evaluation(evaluation("align", "during", 6.2, "an orange", 999_999))
    assert run.steps("align") == [*before[:-1], replace(step(40, 80), loss=1.0), step(41, 80)]
    assert [each.step for each in run.evaluations("align")] == [20, 999_999, 1_000_000]
    assert len(RunFolder(run.root).steps("align")) == 2, "who comes anew reads all that is there"


def test_bins_hold_every_step_once() -> None:
    values = np.arange(1000.0)
    edges = bins(1000, 300)
    binned = Binned.of(values, edges)
    assert len(edges) == 250
    assert binned.mean.mean() == values.mean()
    assert (binned.low.min(), binned.high.max()) == (0.0, 999.0)
    weighed = Binned.of(np.array([1.0, 3.0]), bins(2, 1), np.array([3.0, 1.0]))
    assert weighed.mean.tolist() == [1.5]


def test_workers_faults_and_phases_are_on_the_page(tmp_path: Path, recipe: Recipe) -> None:
    run, _ = invented_run(tmp_path / "night", recipe, "running")
    state = troubled(run)
    file = write_report(run, recipe, state).path
    page = Page(file)
    assert {"crew-workers", "crew-faults", "align-phases", "pretrain-phases"} <= set(page.ids)
    found = tables(file)
    assert found["crew"]["workers"] == [2, 1, 4, 3, 0, 3, 3]
    assert sorted(found["crew"]["time"]) == found["crew"]["time"]
    assert found["faults"]["what"][:3] == ["hang", "restart", "not finite"]
    assert "rank 0 was the slowest in 68 % of the steps" in page.text
    assert set(found["align/phases"]["phase"]) == set(PHASES)
    assert sum(found["align/phases"]["seconds"][::40]) == pytest.approx(0.5)
    hang = next(row for row in page.rows if len(row) == 5 and row[3].strip() == "hang")
    assert [cell.strip() for cell in hang[1:3]] == ["align", "11"]


def test_what_came_from_data_stays_words(tmp_path: Path, recipe: Recipe) -> None:
    """A caption, a reason and an answer that are scripts: no element is made of them, nor does one end the page's own script."""
    run, _ = invented_run(tmp_path / "night", recipe, "running")
    run.write_evaluation(evaluation("align", "after", 6.0, f"{SCRIPT}</script>{SCRIPT}"))
    bad = replace(step(10, 40), dropped=(f"example-pairs/00000.tar row 10: image file is truncated ({SCRIPT})",))
    run.write_step("align", bad)
    file = write_report(run, recipe, troubled(run)).path
    page = Page(file)
    assert SCRIPT in page.text
    assert SCRIPT not in file.read_text()
    assert page.scripts == 2, "Vega, and the page's own"


def test_dropped_rows_are_shown_with_their_pictures(tmp_path: Path, recipe: Recipe, site: Site) -> None:
    run, _ = invented_run(tmp_path / "night", recipe, "running")
    evidence = Evidence(site, recipe)
    file = write_report(run, recipe, troubled(run), evidence).path
    assert file.read_text().count('alt="a picture of example-pairs/00000.tar row') == 4
    whole = picture()
    small = thumbnail(whole, Limits())
    assert small.startswith("data:image/jpeg;base64,")
    assert thumbnail(whole[: len(whole) // 2], Limits()).startswith("data:image/jpeg"), "down to where it ends"
    assert thumbnail(b"no picture", Limits()) == ""
    assert thumbnail(whole, Limits(pixels=10)) == ""
    elsewhere = Evidence(replace(site, corpora={}), recipe)
    assert elsewhere.of(quarantine.rows(run)) == {}


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 80).save(buffer, "JPEG")
    return buffer.getvalue()


def dump_step(record: StepRecord) -> bytes:
    return TypeAdapter(StepRecord).dump_json(record)


def tables(file: Path) -> dict[str, dict[str, list]]:
    """The tables that the page's charts draw."""
    found = re.search(r"(?m)^const tables = (.*);$", file.read_text())
    assert found
    return json.loads(found[1])


def test_smoothing_keeps_a_constant_and_follows_a_fall() -> None:
    assert smoothed([3.0] * 50, 20) == pytest.approx([3.0] * 50)
    falling = smoothed([10.0 - i for i in range(10)], 5)
    assert falling[0] == pytest.approx(10.0)
    assert falling == sorted(falling, reverse=True)
