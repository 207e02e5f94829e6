"""Invariants of the repository itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = sorted(file for floor in ("ops", "pipelines", "mllm", "cluster") for file in (ROOT / floor).rglob("*.py"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_modules_classes_and_functions_say_what_they_are(file: Path) -> None:
    tree = ast.parse(file.read_text())
    silent = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            single = isinstance(node, ast.FunctionDef) and len(node.body) <= 6
            if not ast.get_docstring(node) and not single:
                silent.append(node.name)
    assert not silent, f"without a docstring: {silent}"


def test_the_example_corpus_stays_small_and_names_its_sources() -> None:
    corpus = ROOT / "examples" / "corpus"
    size = sum(file.stat().st_size for file in corpus.rglob("*") if file.is_file())
    assert size < 12 * 2**20
    attribution = (corpus / "ATTRIBUTION.md").read_text()
    assert {"CC0-1.0", "OFL-1.1", "BSD-3-Clause", "Apache-2.0"} <= set(attribution.replace("|", " ").split())


def test_held_out_pictures_are_in_no_training_row() -> None:
    import json
    import tarfile

    corpus = ROOT / "examples" / "corpus"

    def keys(folder: str) -> set[str]:
        found = set()
        for file in sorted((corpus / folder).glob("*.tar")):
            with tarfile.open(file) as archive:
                found |= {Path(name).stem for name in archive.getnames() if name.endswith(".jpg")}
        return found

    held = keys("pairs-heldout")
    assert len(held) == 90
    assert not held & keys("pairs")
    for item in json.loads((corpus / "instruct/llava_instruct.json").read_text()):
        images = item.get("image") or []
        assert not held & {Path(name).stem for name in ([images] if isinstance(images, str) else images)}
