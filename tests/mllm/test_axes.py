"""One axis changed: every connector behind the towers, tiling and join of every system that splices. It fits, or says why not."""

import json
import re
from dataclasses import asdict, replace
from functools import cache

import pytest

from cluster.cli import main
from cluster.plan import plan
from cluster.site import load_site
from mllm.connectors import (
    MLP,
    SVA,
    Abstractor,
    Branches,
    Connector,
    ConvGLU,
    CrossPool,
    FirstFeature,
    InstructedQFormer,
    Linear,
    PatchMining,
    Perceiver,
    PixelShuffle,
    Pool,
    QFormer,
    QLLaMA,
    Transformer,
)
from mllm.recipe import Full, Recipe, dump, override
from mllm.recipes import TOWERS_AND_SPLICE, by_name
from mllm.tiny import tiny
from tests.conftest import ROOT

SITE = load_site(str(ROOT / "examples" / "site.toml"))

CONNECTORS: dict[str, Connector] = {
    connector.kind: connector.tiny()
    for connector in (
        *(
            Linear(),
            MLP(),
            PixelShuffle(),
            Pool(),
            ConvGLU(),
            Transformer(),
            QFormer(),
            InstructedQFormer(),
            Perceiver(),
        ),
        *(CrossPool(), Abstractor(), QLLaMA(), FirstFeature(), PatchMining(), SVA(windows=(1, 2))),
        Branches(parts=(QFormer(), Linear())),
    )
}


@cache
def small(name: str) -> Recipe:
    """The first stage of the system at toy size, which trains the whole connector."""
    recipe = tiny(by_name(name))
    stage = replace(recipe.stages[0], tune={"connector": Full(lr=1e-3)}, annotators=())
    return replace(recipe, stages=(stage,))


def systems() -> list[str]:
    """One for each way in which pictures come to a connector: towers and what is read of them, tiling and join."""
    found: dict[str, str] = {}
    for function in TOWERS_AND_SPLICE:
        words = json.loads(dump(small(function.__name__)))
        model, tiling = words["model"], words["tiling"]
        towers = model["encoder"].get("towers", [model["encoder"]])
        read = [[tower["arch"]["kind"], tower["cls"]] for tower in towers]
        found.setdefault(json.dumps([read, tiling["kind"], model["join"]]), function.__name__)
    return list(found.values())


def outcome(recipe: Recipe, connector: Connector) -> str:
    """Why a recipe does not take a connector; an empty word where it is planned: counted, and run on tensors without memory."""
    words = json.dumps(asdict(connector))
    try:
        changed = override(recipe, [f"model.connector={words}"])
    except ValueError as error:
        return str(error)
    (stage,) = plan(changed, SITE, ()).stages
    assert stage.flops
    assert stage.parts[1].part == "connector"
    assert stage.parts[1].trained > 0
    return ""


REASON = re.compile(r"connector|no square grid|one tile is \d+ tokens and a pack holds")


@pytest.mark.parametrize("name", systems())
def test_each_connector_is_planned_or_refused_with_a_reason(name: str) -> None:
    recipe = small(name)
    found = {kind: outcome(recipe, connector) for kind, connector in CONNECTORS.items()}
    assert not found[recipe.vlm.connector.kind] or recipe.vlm.connector.kind == "sva"
    unexplained = {kind: why for kind, why in found.items() if why and not REASON.search(why)}
    assert not unexplained
    several = {"sva", "patch_mining"}
    assert {kind for kind, why in found.items() if not why} <= (
        several if len(recipe.vlm.encoder.towers) > 1 else set(CONNECTORS) - several
    )


def test_a_connector_is_changed_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "llava_15_7b", "-s", 'model.connector={"kind":"pixel_shuffle"}'])
    assert "144 tokens a tile" in capsys.readouterr().out
    main(["recipes", "cambrian_1_8b", "--tree"])
    told = capsys.readouterr().out
    assert "sva" in told
    assert "in_lm_sampler" in told
