"""Python that lies beside weights is run where the site trusts it, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.controller import Controller, RunError
from cluster.plan import plan
from cluster.site import Site, load_site
from mllm.annotators import ScoreFilter
from mllm.recipe import Recipe
from mllm.weights import UntrustedCode
from pipelines import trust

WORDS = r"the weights in {} want to run Python of their own, theirs\.{} \(auto_map in config\.json\), and the site does not trust"

CODE = """
from pathlib import Path
from transformers import {base}

Path({mark!r}).write_text("run")

class {name}({base}):
    theirs = True
"""


@pytest.fixture(autouse=True)
def distrust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    yield
    trust.use(False)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What the code beside the weights writes when it is run."""
    return tmp_path / "mark"


def add_code(folder: Path, auto: str, name: str, base: str, mark: Path) -> str:
    """Have the weights in `folder` bring a class of their own."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {auto: f"theirs.{name}"}}))
    (folder / "theirs.py").write_text(CODE.format(base=base, name=name, mark=str(mark)))
    return str(folder)


@pytest.fixture
def strange(small: Recipe, site: Site, tmp_path: Path, mark: Path) -> tuple[Recipe, Site]:
    """The small recipe, whose encoder and language model begin with weights that bring code."""
    model = small.vlm.build()
    tower, decoder = model.encoder.tower, model.lm.model
    assert hasattr(tower, "tower")
    tower.tower.save_pretrained(tmp_path / "tower")  # type: ignore[operator]
    decoder.save_pretrained(tmp_path / "lm")
    there = {
        "tower": add_code(tmp_path / "tower", "AutoModel", "Tower", "CLIPVisionModel", mark),
        "lm": add_code(tmp_path / "lm", "AutoModelForCausalLM", "Decoder", "LlamaForCausalLM", mark),
    }
    lm = replace(small.vlm.lm, weights="lm")
    spec = replace(small.vlm, encoder=replace(small.vlm.encoder, weights="tower"), lm=lm)
    return replace(small, model=spec), replace(site, weights=site.weights | there)


def test_code_that_is_not_trusted_is_refused_before_a_worker_starts(
    strange: tuple[Recipe, Site], tmp_path: Path, mark: Path
) -> None:
    recipe, site = strange
    with pytest.raises(RunError, match=WORDS.format(tmp_path / "tower", "Tower")) as refused:
        Controller(recipe, site, None).prepare()
    assert str(tmp_path / "lm") in str(refused.value)
    assert "set trust_remote_code = true in the site file" in str(refused.value)
    assert len(plan(recipe, site, [1]).refused) == 2
    for part in (recipe.vlm.encoder, recipe.vlm.lm):
        with pytest.raises(UntrustedCode):
            part.build(site.folder)
    assert not mark.exists(), "it was run"


def test_code_that_is_trusted_is_run(strange: tuple[Recipe, Site], mark: Path) -> None:
    recipe, site = strange
    site = replace(site, trust_remote_code=True)
    assert Controller(recipe, site, None).prepare().stage is None
    assert not mark.exists(), "asking alone runs nothing"
    trust.use(site.stream(recipe, recipe.stages[0]).trust_remote_code)
    model = recipe.vlm.build(site.folder)
    assert mark.exists()
    assert model.lm.model.theirs
    assert model.encoder.tower.tower.theirs  # type: ignore[union-attr]
    assert not hasattr(model.lm.model.config, "auto_map"), "exports hold no code"
    assert torch.isfinite(model.lm.head).all()


def test_a_class_that_is_none_of_the_arch_is_refused(strange: tuple[Recipe, Site], tmp_path: Path, mark: Path) -> None:
    recipe, site = strange
    trust.use(True)
    add_code(tmp_path / "lm", "AutoModelForCausalLM", "Other", "CLIPVisionModel", mark)
    with pytest.raises(ValueError, match=r"theirs\.Other .* is no LlamaForCausalLM"):
        recipe.vlm.lm.build(site.folder)


def test_an_annotators_code_is_never_run(strange: tuple[Recipe, Site], mark: Path) -> None:
    recipe, site = strange
    site = replace(site, trust_remote_code=True)
    trust.use(True)
    score = ScoreFilter(weights="tower", at_least=0.2)
    annotated = replace(recipe, stages=tuple(replace(s, annotators=(score,)) for s in recipe.stages))
    with pytest.raises(RunError, match="annotators run transformers' own models alone; take auto_map out"):
        Controller(annotated, site, None).prepare()
    with pytest.raises(UntrustedCode, match="annotators run"):
        score.documents(site.folder)
    assert not mark.exists()


def test_the_site_file_says_so_and_the_default_does_not(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text("trust_remote_code = true")
    assert load_site(str(file)).trust_remote_code
    assert trust.in_use()
    file.write_text("")
    assert not load_site(str(file)).trust_remote_code
    assert not trust.in_use()
