"""An export as vLLM serves it. Runs where vLLM is installed (extra `vllm`), which wants a GPU; it has been run nowhere yet."""

from __future__ import annotations

import base64
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from mllm.export import export
from mllm.generate import Sampling
from mllm.recipes import by_name
from mllm.speaker import Speaker, Turn
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not (find_spec("vllm") and torch.cuda.is_available()), reason="needs vLLM (extra `vllm`) and a GPU"
)


def test_it_answers_as_the_model_does(tmp_path: Path) -> None:
    """Greedily, in float32: to words alone, and to a picture with words."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] -- an extra

    recipe = by_name("vila_smoke")
    torch.manual_seed(0)
    folder = export(recipe, recipe.model.build(), str(ROOT / "examples" / "tokenizer"), tmp_path / "export")
    out = io.BytesIO()
    PIL.Image.new("RGB", (120, 80), (200, 40, 90)).save(out, "PNG")
    question = "What is shown here?"
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    text: dict[str, Any] = {"type": "text", "text": question}
    asked = [[text], [{"type": "image_url", "image_url": {"url": url}}, text]]
    speaker = Speaker.open(folder, "cuda")
    wanted = [
        speaker.answer([Turn(role="user", parts=parts)], Sampling(max_tokens=16))
        for parts in ((question,), (out.getvalue(), question))
    ]
    vllm = LLM(model=str(folder), dtype="float32", max_model_len=speaker.context, enforce_eager=True)
    told = vllm.chat(
        [[{"role": "user", "content": parts}] for parts in asked], SamplingParams(temperature=0, max_tokens=16)
    )
    assert [each.outputs[0].text for each in told] == wanted
