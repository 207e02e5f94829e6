"""What `mllm eval` does: a run's last checkpoint on held-out corpora, on text alone, and on questions in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from rich.console import Console

from cluster.controller import RunError
from cluster.engines import alone, build_engine
from cluster.local import quieten
from cluster.metrics import Evaluation, RunFolder
from cluster.run import last_finished, open_run, trained_model
from cluster.site import Site
from mllm.evaluate import ProbeScore, SourceScore
from mllm.generate import Sampling
from mllm.model import Model
from mllm.recipe import FSDP, Recipe, Stage
from mllm.speaker import BadTurns, Speaker, Turn
from mllm.tasks import TaskName, read_items, task_of
from pipelines.corpora import TextOnly
from pipelines.types import spec

TOGETHER = 16
"""Questions that are answered at a time."""

WORDS = 32
"""Tokens of an answer, which is to be short."""


@spec
class Retention:
    """What a text-only corpus costs the model, nats a token: `before` the first stage, and `after` the last."""

    source: str
    before: float
    after: float


@spec
class TaskScore:
    """A benchmark's numbers, the first being what tables show; `refused` questions could not be asked, and count as wrong."""

    task: str
    file: str
    questions: int
    refused: int
    scores: dict[str, float]


@spec
class Scores:
    """All that an evaluation found of a run's last finished stage, as `--out` has it."""

    run: str
    stage: str
    fingerprint: str
    scores: tuple[SourceScore, ...] = ()
    probe: tuple[ProbeScore, ...] = ()
    retention: tuple[Retention, ...] = ()
    task: TaskScore | None = None

    def write(self, out: Path) -> None:
        """Write them as JSON."""
        out.write_bytes(TypeAdapter(Scores).dump_json(self, indent=1))


def evaluate_run(
    site: Site, name: str, console: Console, shots: Sequence[int] = (), texts: Sequence[str] = ()
) -> Scores:
    """Evaluate the last checkpoint in this process, print the scores and return them.

    `shots` stand in place of the recipe's; `texts` are corpora of text alone whose loss is held against the loss before the
    first stage, besides those that the recipe holds out. Raises RunError where nothing is held out.
    """
    folder, recipe, _ = open_run(site, name)
    quieten(folder.logs)
    mark = last_finished(folder)
    stage = recipe.stage(mark.stage)
    if shots:
        recipe = replace(recipe, shots=tuple(sorted(set(shots))))
    known = {corpus.name for corpus in recipe.held_out}
    more = tuple(TextOnly(name=text) for text in texts if text not in known)
    recipe = replace(recipe, held_out=(*recipe.held_out, *more))
    if not recipe.held_out:
        raise RunError(f"recipe {recipe.name!r} holds no corpus out, so there is nothing to evaluate on")
    after = _evaluated(site, recipe, stage, trained_model(recipe, folder))
    for score in after.scores:
        console.print(
            f"{score.source:<32} loss {score.loss:7.4f}   accuracy {score.accuracy:6.1%}   {score.tokens:,} tokens"
        )
    for probe in after.probe:
        console.print(_probe(probe))
    retention = tuple(_retention(site, recipe, folder, after))
    for one in retention:
        console.print(
            f"{one.source:<32} text alone: {one.before:.4f} before the first stage, {one.after:.4f} now "
            f"({one.after - one.before:+.4f} nats a token)",
            soft_wrap=True,
        )
    return Scores(
        run=folder.name,
        stage=stage.name,
        fingerprint=mark.fingerprint,
        scores=after.scores,
        probe=after.probe,
        retention=retention,
    )


def _probe(probe: ProbeScore) -> str:
    if not probe.questions:
        return f"{probe.shots}-shot: no question of so many examples fits the model's context"
    return f"{probe.shots}-shot: {probe.accuracy:.0%} of {probe.questions} questions, chance {1 / probe.choices:.0%}"


def _evaluated(site: Site, recipe: Recipe, stage: Stage, model: Model) -> Evaluation:
    from cluster.scoring import evaluation_of

    held_out = site.held_out(recipe, stage)
    assert held_out is not None  # the recipe holds some out
    with alone():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        single = replace(stage, parallel=FSDP(dtype=stage.parallel.dtype))
        return evaluation_of(build_engine(model, single, 1, device), held_out, recipe, stage.name, "after")


def _retention(site: Site, recipe: Recipe, folder: RunFolder, after: Evaluation) -> list[Retention]:
    """Losses on text alone beside those before the first stage: as the run itself found them, else of the first weights anew."""
    texts = tuple(corpus for corpus in recipe.held_out if isinstance(corpus, TextOnly))
    if not texts:
        return []
    first = recipe.stages[0]
    told = folder.evaluation(first.name, "before")
    before = {} if told is None else {score.source: score.loss for score in told.scores}
    lacking = tuple(corpus for corpus in texts if corpus.name not in before)
    if lacking:
        torch.manual_seed(recipe.seed)
        model = recipe.model_of(first).build(site.folder)
        found = _evaluated(site, replace(recipe, held_out=lacking, shots=()), first, model)
        before |= {score.source: score.loss for score in found.scores}
    now = {score.source: score.loss for score in after.scores}
    return [Retention(source=c.name, before=before[c.name], after=now[c.name]) for c in texts]


def evaluate_task(
    site: Site, name: str, task: TaskName, file: Path, pictures: Path | None, most: int | None, console: Console
) -> Scores:
    """Have the run's last checkpoint answer a file of questions, greedily, score the answers and print the numbers.

    Raises RunError, ValueError for a file that cannot be read so.
    """
    chosen = task_of(task)
    items = read_items(file, pictures)[:most]
    asked = [one for item in items for one in chosen.ask(item)]
    folder, recipe, _ = open_run(site, name)
    quieten(folder.logs)
    mark = last_finished(folder)
    words = recipe.model.words.tokenizer
    model = trained_model(recipe, folder)
    if torch.cuda.is_available():
        model = model.cuda()
    asks = recipe.instructions
    annotate = asks.packs(site.folder) if asks else None
    speaker = Speaker(recipe, model, site.folder(words) if words else "", annotate=annotate)
    answers, refused = _answers(speaker, [one.turns for one in asked], console)
    scores = chosen.scores(asked, answers)
    for key, value in scores.items():
        console.print(f"{key:<32} {value:.4f}")
    if refused:
        console.print(f"{refused} of {len(asked)} could not be asked, and count as wrong")
    told = TaskScore(task=task, file=str(file), questions=len(asked), refused=refused, scores=scores)
    return Scores(run=folder.name, stage=mark.stage, fingerprint=mark.fingerprint, task=told)


def _answers(speaker: Speaker, asked: Sequence[tuple[Turn, ...]], console: Console) -> tuple[list[str], int]:
    """Answers in order, empty where a question could not be asked; and how many could not."""
    answers = [""] * len(asked)
    refused = 0
    for start in range(0, len(asked), TOGETHER):
        prompts, places = [], []
        for place in range(start, min(start + TOGETHER, len(asked))):
            try:
                prompts.append(speaker.prompt(asked[place], Sampling(max_tokens=WORDS)))
                places.append(place)
            except BadTurns as error:
                refused += 1
                console.print(f"question {place + 1}: {error}", markup=False, soft_wrap=True)
        if prompts:
            for place, answer in zip(places, speaker.answers(prompts), strict=True):
                answers[place] = answer.strip()
    return answers, refused
