"""Our models in lmms-eval, offline, on a task in local files. `make test-extras` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from mllm.export import export
from mllm.generate import Sampling
from mllm.recipe import Recipe
from mllm.speaker import Speaker, Turn
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.skipif(not find_spec("lmms_eval"), reason="needs lmms-eval: `make test-extras` has it"),
    pytest.mark.filterwarnings("ignore"),  # the harness's own dependencies warn at import
]

TOKENIZER = str(ROOT / "examples" / "tokenizer")

TASK = """
task: toy_see
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false, num_beams: 1}}
process_results: !function utils.scored
metric_list: [{{metric: length, aggregation: !function utils.mean, higher_is_better: true}}]
"""

FUNCTIONS = """
import PIL.Image

def pictures(document):
    return [PIL.Image.open(path) for path in document["pictures"]]

def question(document, lmms_eval_specific_kwargs=None):
    return document["question"]

def scored(document, results):
    return {"length": len(results[0])}

def mean(values):
    return sum(values) / len(values)
"""


@pytest.fixture(scope="module")
def folder(small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(small, small.model.build(), TOKENIZER, tmp_path_factory.mktemp("run") / "export")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of four questions: about no picture, one, two, and one again."""
    rows = []
    for number, shown in enumerate((0, 1, 2, 1)):
        paths = [tmp_path / f"{number}-{at}.png" for at in range(shown)]
        for at, path in enumerate(paths):
            PIL.Image.new("RGB", (40 + 30 * number, 60), (200, 90 * at, 30 * number)).save(path)
        rows.append(
            {"pictures": [*map(str, paths)], "question": f"How many are there, {number}?", "answer": str(shown)}
        )
    file = tmp_path / "toy.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy_see.yaml").write_text(TASK.format(file=file))
    (tmp_path / "utils.py").write_text(FUNCTIONS)
    return tmp_path


def expected(folder: Path, task: Path) -> list[str]:
    """What the model says to each question by itself."""
    speaker = Speaker.open(folder)
    rows = [json.loads(line) for line in (task / "toy.jsonl").read_text().splitlines()]
    return [
        speaker.answer(
            [Turn(role="user", parts=(*(Path(path).read_bytes() for path in row["pictures"]), row["question"]))],
            Sampling(max_tokens=6),
        )
        for row in rows
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_local_task_is_answered_as_the_model_answers(folder: Path, task: Path, batch: int) -> None:
    from lmms_eval import evaluator  # pyright: ignore[reportMissingImports] -- an extra
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] -- an extra

    from mllm.lmms import Lmms

    manager = TaskManager(include_path=str(task), include_defaults=False)
    told = evaluator.simple_evaluate(
        model=Lmms(folder, batch_size=batch), tasks=["toy_see"], task_manager=manager, bootstrap_iters=0
    )
    answers = [sample["filtered_resps"][0] for sample in told["samples"]["toy_see"]]
    wanted = expected(folder, task)
    assert answers == wanted
    assert told["results"]["toy_see"]["length,none"] == pytest.approx(sum(map(len, wanted)) / 4)


def test_its_command_finds_the_model_by_its_name(folder: Path, task: Path) -> None:
    words = (
        f"-m lmms_eval --model mllm --model_args folder={folder} --tasks toy_see --include_path {task} --batch_size 2"
    )
    out = ["--output_path", str(task / "out"), "--log_samples"]
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words.split(), *out]
    ended = subprocess.run(command, env=there, cwd=task, timeout=300, check=False, capture_output=True, text=True)
    assert (task / "out").is_dir(), ended.stdout[-3000:] + ended.stderr[-3000:]  # it ends with 0 whatever happens
    (results,) = (task / "out").rglob("*_results.json")
    wanted = expected(folder, task)
    scores = json.loads(results.read_text())["results"]["toy_see"]
    assert scores["length,none"] == pytest.approx(sum(map(len, wanted)) / 4)


@pytest.mark.parametrize(
    ("how", "content", "words"),
    [
        ({"num_beams": 4}, "Hello", "num_beams=4"),
        ({"repetition_penalty": 2}, "Hello", "repetition_penalty"),
        ({}, [{"type": "video", "url": "a.mp4"}], "video"),
        ({}, [{"type": "text", "text": "long " * 5000}], "tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_document_s_name(
    folder: Path, how: dict[str, Any], content: Any, words: str
) -> None:
    from types import SimpleNamespace

    from mllm.lmms import Lmms

    model = Lmms(folder)
    model.task_dict = {"toy": {"test": [None]}}
    request = SimpleNamespace(args=("", lambda _: [{"role": "user", "content": content}], how, 0, "toy", "test"))
    with pytest.raises(ValueError, match=rf"task 'toy', document 0 of 'test': .*{words}"):
        model.generate_until([request])
