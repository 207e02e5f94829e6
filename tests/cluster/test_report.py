"""The report, read as a browser would read it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from invented import invented_run

from cluster.journal import RunState
from cluster.metrics import RunFolder
from cluster.report import smoothed, write_report
from mllm.recipe import Recipe


class Page(HTMLParser):
    """Words, headings, table rows, addresses and ids of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.inside: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link"):
            self.inside.append(tag)
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
    assert "expected an orange square written after sft orange" in written.text
    assert "written before training a <b>dog</b>" in written.text, "what a model writes is text, not markup"


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


def test_smoothing_keeps_a_constant_and_follows_a_fall() -> None:
    assert smoothed([3.0] * 50, 20) == pytest.approx([3.0] * 50)
    falling = smoothed([10.0 - i for i in range(10)], 5)
    assert falling[0] == pytest.approx(10.0)
    assert falling == sorted(falling, reverse=True)
