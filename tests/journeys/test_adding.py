"""`docs/adding.md`, followed word by word in a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(300)
def test_the_page_adds_a_connector(tmp_path: Path) -> None:
    for room in ("ops", "pipelines", "mllm", "cluster", "examples", "tests"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "adding.md").read_text()
    blocks = re.findall(
        r"^(To|In|[^\n]*As) `([\w./]+)`(?:, in `(\w+)`)?:\n\n```python\n(.*?)```", page, re.MULTILINE | re.DOTALL
    )
    assert [how.split()[-1] for how, *_ in blocks] == ["To", "To", "In", "As"]
    for how, name, union, code in blocks:
        file = tmp_path / name
        text = file.read_text() if file.is_file() else ""
        match how.split()[-1]:
            case "To":  # before the union, which names what stands above it
                text = text.replace("\nConnector = ", f"\n{code}\n\nConnector = ")
            case "In":
                text = re.sub(
                    rf"(\n{union} = Annotated\[.*?)(,\n    Field)", rf"\1\n{code.rstrip()}\2", text, flags=re.DOTALL
                )
            case _:
                text = code
        file.write_text(text)
    test = next(name for how, name, *_ in blocks if how.endswith("As"))
    told = called(tmp_path, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test])
    assert "2 passed" in told
    commands = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("    mllm ")]
    assert [words[0] for words in commands] == ["plan", "train"]
    site = (ROOT / "examples" / "site.toml").read_text().replace("../runs", str(tmp_path / "runs"))
    (tmp_path / "examples" / "site.toml").write_text(site)
    planned, trained = (called(tmp_path, [sys.executable, "-m", "cluster.cli", *words]) for words in commands)
    assert "144 tokens" in planned
    assert "vila_7b-tiny  finished" in trained


def called(folder: Path, words: list[str]) -> str:
    """What a command prints, run in `folder` on the project that lies there."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "MLLM_SITE": str(folder / "examples" / "site.toml")}
    run = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout
