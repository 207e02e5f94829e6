"""Our models in EleutherAI's harness, offline, on a task in a local file. `make test-extras` runs it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mllm.export import export
from mllm.recipe import Recipe
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.skipif(not find_spec("lm_eval"), reason="needs lm-eval: `make test-extras` has it"),
    pytest.mark.filterwarnings("ignore"),  # the harness's own dependencies warn at import
]

TOKENIZER = str(ROOT / "examples" / "tokenizer")

CHOOSE = """
task: toy_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["{{{{a}}}}", "{{{{b}}}}"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(small, small.model.build(), TOKENIZER, tmp_path_factory.mktemp("run") / "export")


def asks(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_log_probabilities_are_those_of_transformers(folder: Path) -> None:
    """Of the exported folder, read by transformers alone; whatever else is asked at the same time."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    from mllm.harness import Harness

    harness = Harness.open(folder)
    texts = [("The cat", " sat down."), ("", "Nothing before it"), ("One, two,", " three")]
    told = harness.loglikelihood([asks(*pair) for pair in texts])
    llava = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for (context, more), (value, likeliest) in zip(texts, told, strict=True):
        whole = [*harness.first, *tokenizer(context + more, add_special_tokens=False).input_ids]
        count = (
            len(whole)
            - len(harness.first)
            - len(tokenizer(context, add_special_tokens=False).input_ids if context else [])
        )
        with torch.no_grad():
            logits = llava(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)[-count:]
        wanted = torch.tensor(whole[-count:])
        assert value == pytest.approx(float(logits.gather(1, wanted[:, None]).sum()), abs=1e-3)
        assert likeliest == bool((logits.argmax(-1) == wanted).all())
    (rolled,) = harness.loglikelihood_rolling([asks("Nothing before it")])
    assert rolled == pytest.approx(told[1][0], abs=1e-3)
    written = harness.generate_until([asks("The cat", {"until": ["\n"], "max_gen_toks": 5})] * 2)
    assert written[0] == written[1]
    assert harness.loglikelihood([asks(*texts[0])])[0] == pytest.approx(told[0], abs=1e-4)


def test_a_local_task_is_evaluated_offline(folder: Path, tmp_path: Path) -> None:
    import lm_eval  # pyright: ignore[reportMissingImports] -- an extra
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] -- an extra

    from mllm.harness import Harness

    rows = [{"question": f"{n} and {n} is", "a": f"{2 * n}", "b": f"{3 * n}"} for n in range(1, 7)]
    file = tmp_path / "toy.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy_choose.yaml").write_text(CHOOSE.format(file=file))
    harness = Harness.open(folder)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    told = lm_eval.simple_evaluate(model=harness, tasks=["toy_choose"], task_manager=manager, bootstrap_iters=0)
    samples = told["samples"]["toy_choose"]
    assert len(samples) == len(rows)
    for sample in samples:
        asked = [asks(*arguments) for arguments in sample["arguments"]]
        ours = [value for value, _ in harness.loglikelihood(asked)]
        assert [float(value) for value, _ in sample["filtered_resps"]] == pytest.approx(ours, abs=1e-3)
        assert sample["acc"] == float(ours[0] >= max(ours))
