"""A run from its command to its export, and the same run killed in every stage."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from cluster.cli import main
from cluster.evaluating import evaluate_run
from cluster.journal import Journal
from cluster.metrics import RunFolder
from cluster.run import show_status, train, trained_model
from cluster.site import Site, load_site
from mllm.recipe import Recipe, override
from mllm.recipes import by_name
from mllm.released import read_release
from tests.conftest import CORPUS, ROOT

STEPS = 10
STAGES = ("align", "pretrain", "sft")

COMMANDS = [
    line.split("#")[0].split()[1:]
    for line in (ROOT / "README.md").read_text().split("<!-- commands")[1].split("\n## ")[0].splitlines()
    if line.startswith("    mllm ")
]
TRAIN = next(words for words in COMMANDS if words[0] == "train")
SHORTER = [f"held_out={json.dumps([{'kind': 'pairs', 'name': 'example-pairs-heldout'}])}"] + [
    f"stages.{stage}.{change}"
    for stage in STAGES
    for change in (
        "context=256",
        "tokens_per_step=1024",
        "max_tiles=6",
        "window=24",
        "save_every=2",
        f"duration.count={STEPS}",
    )
]


@pytest.fixture(scope="module")
def short() -> Recipe:
    """The recipe of the README's own training command, with fewer and smaller steps."""
    changes = TRAIN[TRAIN.index("-s") + 1 :]
    return override(by_name(TRAIN[1]), [*changes, *SHORTER])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = load_site(str(ROOT / "examples" / "site.toml"))
    return replace(site, runs=str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def unbroken(short: Recipe, here: Site, ray_cluster: None) -> tuple[RunFolder, str]:  # noqa: ARG001 -- a fixture cannot use `usefixtures`
    """The run on one worker, never disturbed, and what a person saw of it."""
    seen = io.StringIO()
    folder = train(short, here, "unbroken", Console(file=seen, width=140))
    return folder, seen.getvalue()


def test_all_stages_are_trained_evaluated_and_told(unbroken: tuple[RunFolder, str]) -> None:
    folder, seen = unbroken
    state = Journal(folder.root).state()
    assert state.finished
    assert [event.stage for event in state.finished_stages] == list(STAGES)
    for stage in STAGES:
        assert [record.step for record in folder.steps(stage)] == list(range(1, STEPS + 1))
        for record in folder.steps(stage):
            assert 0 < record.flops < record.hardware_flops
            assert record.mfu is not None
            assert 0 < record.mfu < 2  # of what products alone reach; a noisy machine may have been slower then
        before, after = (folder.evaluation(stage, when) for when in ("before", "after"))  # type: ignore[arg-type]  # else the test fails
        assert before is not None
        assert after is not None
        assert [probe.shots for probe in after.probe] == [0, 4]
        assert f"{stage}" in seen
    assert "encoder            896,768 parameters, frozen" in seen
    assert "warning" not in seen.lower()
    page = folder.report.read_text()
    assert all(stage in page for stage in STAGES)


def test_held_out_loss_falls(unbroken: tuple[RunFolder, str]) -> None:
    folder, _ = unbroken
    losses = []
    for stage in STAGES[:2]:
        for when in ("before", "after"):
            evaluation = folder.evaluation(stage, when)  # type: ignore[arg-type]  # else the test fails
            assert evaluation is not None
            losses.append(evaluation.scores[0].loss)
    assert losses[0] > losses[1] + 0.2
    assert losses[1] == losses[2]
    assert losses[2] > losses[3] + 0.2


def test_the_export_is_the_trained_model(unbroken: tuple[RunFolder, str], short: Recipe) -> None:
    from transformers import LlavaForConditionalGeneration

    folder, _ = unbroken
    llava = LlavaForConditionalGeneration.from_pretrained(folder.export)
    ours: Any = trained_model(short, folder)
    torch.testing.assert_close(llava.lm_head.weight, ours.lm.head)
    theirs = llava.model.language_model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(theirs, ours.lm.model.model.layers[0].self_attn.q_proj.weight)


def test_the_export_is_released(unbroken: tuple[RunFolder, str]) -> None:
    """Read by transformers, compared on a held-out picture; whoever watched the run was told."""
    folder, seen = unbroken
    told = read_release(folder.export.path)
    assert told is not None
    assert told.read_by == "LlavaForConditionalGeneration"
    assert told.on.startswith("held-out row example-pairs-heldout/")
    assert told.greatest <= told.allowed
    assert told.fingerprint == Journal(folder.root).state().finished_stages[-1].fingerprint
    assert "released: read back by LlavaForConditionalGeneration" in " ".join(seen.split())


def test_a_run_is_evaluated_as_one_asks(
    unbroken: tuple[RunFolder, str],
    here: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other shots, a text-only corpus beside what the first weights made of it, and a benchmark's questions."""
    monkeypatch.setenv("MLLM_SITE", site_file(here))
    out = tmp_path / "scores.json"
    main(["eval", "unbroken", "--shots", "0", "1", "--text", "example-text-heldout", "--out", str(out)])
    scores = json.loads(out.read_text())
    told = unbroken[0].evaluation("sft", "after")
    assert told is not None
    assert scores["scores"][0]["loss"] == pytest.approx(told.scores[0].loss, rel=1e-4)
    assert [probe["shots"] for probe in scores["probe"]] == [0, 1]
    (kept,) = scores["retention"]
    assert kept["source"] == "example-text-heldout"
    assert kept["before"] > math.log(2048) - 0.3  # of weights that have learned nothing
    assert kept["after"] < kept["before"] - 0.3
    assert "text alone:" in capsys.readouterr().out

    picture = CORPUS / "instruct" / "images" / "000000017.jpg"
    rows = [
        {
            "question_id": n,
            "question": "What is it?",
            "image": picture.name,
            "choices": ["a cat", "a dog"],
            "answer": "A",
        }
        for n in range(3)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    asked = [
        "--task",
        "mmbench",
        "--file",
        str(file),
        "--images",
        str(picture.parent),
        "--most",
        "2",
        "--out",
        str(out),
    ]
    main(["eval", "unbroken", *asked])
    task = json.loads(out.read_text())["task"]
    assert (task["questions"], task["refused"]) == (4, 0)  # each in both turns
    assert task["scores"].keys() == {"circular", "single"}
    assert task["scores"]["circular"] <= task["scores"]["single"]
    with pytest.raises(SystemExit):
        main(["eval", "unbroken", "--task", "pope"])
    assert "--task and --file go together" in capsys.readouterr().err


def test_frozen_parts_keep_their_first_weights(unbroken: tuple[RunFolder, str], short: Recipe) -> None:
    folder, _ = unbroken
    torch.manual_seed(short.seed)
    first: Any = short.model.build()
    last: Any = trained_model(short, folder)
    assert all(torch.equal(a, b) for a, b in zip(first.encoder.parameters(), last.encoder.parameters(), strict=True))
    assert not torch.equal(first.lm.head, last.lm.head)


def test_a_finished_run_says_so_and_does_nothing(unbroken: tuple[RunFolder, str], short: Recipe, here: Site) -> None:
    folder, _ = unbroken
    events = len(Journal(folder.root).events())
    seen = io.StringIO()
    train(short, here, "unbroken", Console(file=seen, width=140))
    assert "is finished; nothing to do" in seen.getvalue()
    assert len(Journal(folder.root).events()) == events


def test_status_and_eval_tell_of_it_later(unbroken: tuple[RunFolder, str], here: Site) -> None:
    folder, _ = unbroken
    seen = io.StringIO()
    show_status(here, None, Console(file=seen, width=140))
    assert "unbroken" in seen.getvalue()
    evaluate_run(here, "unbroken", Console(file=seen, width=140))
    told = folder.evaluation("sft", "after")
    assert told is not None
    assert f"loss {told.scores[0].loss:7.4f}" in seen.getvalue()


@pytest.mark.usefixtures("unbroken")
def test_another_recipe_under_the_same_name_is_refused(short: Recipe, here: Site) -> None:
    from cluster.controller import RunError

    with pytest.raises(RunError, match=r'"seed": 0 and now "seed": 5.*--run'):
        train(replace(short, seed=5), here, "unbroken", Console(file=io.StringIO()))


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the run ended or stalled (exit {process.poll()}):\n{log.read_text()[-3000:]}")
        time.sleep(0.02)


def processes(driver: int) -> dict[str, int]:
    """What runs under the driver, by what Ray calls it; of those alike one."""
    found = {}
    for child in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[" ".join(child.cmdline()).partition(".")[0].strip()] = child.pid
    return found


@pytest.mark.timeout(900)
def test_killed_in_every_stage_and_on_two_workers_it_is_the_same_run(
    unbroken: tuple[RunFolder, str], short: Recipe, here: Site, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "cluster.cli", *TRAIN, *SHORTER, "--site", site_file(here)]
    folder = RunFolder(Path(here.runs) / short.name)
    log = tmp_path / "log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def within(stage: str, steps: int = 3) -> Callable[[], bool]:
        return lambda: len(folder.steps(stage)) >= steps

    run = start()
    wait_for(within("align"), run, log)
    there = processes(run.pid)
    assert {"ray::RayTrainWorker", "ray::TrainController", "ray::Dealer"} <= there.keys()
    assert not {"ray::DatasetManager", "ray::PlacementGroupCleaner"} & there.keys(), "they would do nothing"
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert len(folder.steps("align")) < STEPS

    run = start()
    wait_for(within("pretrain"), run, log)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(60) == 130
    assert "goes on from the last checkpoint" in log.read_text()
    assert len(folder.steps("pretrain")) < STEPS

    run = start()
    wait_for(within("sft"), run, log)
    os.kill(processes(run.pid)["ray::RayTrainWorker"], signal.SIGKILL)
    wait_for(within("sft", 6), run, log)
    os.kill(processes(run.pid)["ray::TrainController"], signal.SIGKILL)  # what its workers held must be given back
    assert run.wait(240) == 0, log.read_text()[-3000:]

    for stage in STAGES:
        whole, broken = unbroken[0].steps(stage), folder.steps(stage)
        assert [record.world for record in broken] == [2] * STEPS
        assert [record.packs for record in broken] == [record.packs for record in whole]
        assert [record.loss for record in broken] == [pytest.approx(record.loss, rel=1e-4) for record in whole]
        assert [record.lr for record in broken] == [record.lr for record in whole]


def test_asked_to_stop_before_it_trains_it_has_stopped_and_not_failed(
    short: Recipe, here: Site, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "cluster.cli", *TRAIN, *SHORTER, "--site", site_file(here), "--run", "early"]
    folder = RunFolder(Path(here.runs) / "early")
    log = tmp_path / "log"
    with log.open("wb") as out:
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for(lambda: bool(Journal(folder.root).state().starts), run, log)
    run.terminate()
    assert run.wait(60) == 143
    state = Journal(folder.root).state()
    assert state.stopped == "SIGTERM"
    assert state.failure is None
    assert not folder.steps(short.stages[0].name)
    assert "goes on from the last checkpoint" in log.read_text()


def site_file(site: Site) -> str:
    """The site as a file that a command can name."""
    file = Path(site.runs) / "site.toml"
    lines = [f"runs = {json.dumps(site.runs)}", f"cache = {json.dumps(site.cache)}"]
    for table, entries in (("corpora", site.corpora), ("weights", site.weights)):
        lines += [f"[{table}]", *(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in entries.items())]
    file.write_text("\n".join(lines))
    return str(file)


@pytest.mark.parametrize("words", [words for words in COMMANDS if words != TRAIN], ids=" ".join)
def test_every_other_command_of_the_readme_runs(
    words: list[str],
    here: Site,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the run that the training command left behind."""
    monkeypatch.setenv("MLLM_SITE", site_file(here))
    monkeypatch.chdir(tmp_path)
    code = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    assert code == 0
    assert capsys.readouterr().out
