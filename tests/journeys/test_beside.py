"""What is done with committed checkpoints while training goes on: evaluations, and weights as files that others read."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from cluster import beside
from cluster.journal import GateJudged, Journal
from cluster.run import train
from cluster.site import Site
from mllm.care import Gate
from mllm.recipe import Recipe, Steps

STEPS = 60


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_cluster")
def test_checkpoints_are_evaluated_while_the_stage_goes_on_and_judged_by_the_entry_of_the_next(
    small: Recipe, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "LOOK", 0.1)
    align, pretrain, _ = small.stages
    align = replace(align, duration=Steps(count=STEPS), save_every=5, evaluate_every=10)
    pretrain = replace(pretrain, duration=Steps(count=2), entry=Gate(loss=100.0))
    watched = replace(small, stages=(align, pretrain), shots=(0,))
    seen = io.StringIO()
    folder = train(watched, site, None, Console(file=seen, width=140))

    during = folder.evaluations("align")
    assert during, seen.getvalue()
    steps = [each.step or 0 for each in during]
    assert all(step % 5 == 0 and step < STEPS for step in steps)
    assert all(later - earlier >= 10 for earlier, later in pairwise(steps))
    before, after = folder.evaluation("align", "before"), folder.evaluation("align", "after")
    assert before
    assert after
    assert after.scores[0].loss < during[0].scores[0].loss < before.scores[0].loss
    asked = {(answer.row, answer.prompt, answer.expected) for answer in before.answers}
    assert asked
    assert all({(a.row, a.prompt, a.expected) for a in each.answers} == asked for each in during), "the same questions"
    assert f"align, step {steps[0]:,}</th>" in folder.report.read_bytes().decode()

    judged = [event for event in Journal(folder.root).events() if isinstance(event, GateJudged)]
    assert [f"after step {step}" in event.gate for step, event in zip(steps, judged, strict=False)] == [True] * len(
        steps
    )
    assert len(judged) == len(steps) + 1
    assert f"after step {steps[0]}" in seen.getvalue()
