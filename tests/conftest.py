"""Shared real parts: the example corpus, its tokenizer, a tiny model, one Ray for the whole session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from jaxtyping import install_import_hook

install_import_hook("ops", "beartype.beartype")  # the shapes written in signatures hold while tests run

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.site import Site, load_site
from mllm.encoders import ClipVision
from mllm.recipe import Recipe, Steps
from mllm.recipes import by_name
from pipelines import storage
from pipelines.place import Place
from pipelines.storage import Storage
from pipelines.types import Budget, VisionLayout
from pipelines.windows import PackWindows, Stream
from tests.s3 import BUCKET, Server, running

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (ROOT / "tests" / "journeys", ROOT / "tests" / "benchmarks")
CORPUS = ROOT / "examples" / "corpus"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what cannot share the machine with another test: what starts Ray, and whole commands. Files say it of themselves where
    they tell the time.
    """
    for item in items:
        assert isinstance(item, pytest.Function)
        if "ray_cluster" in item.fixturenames or any(folder in item.path.parents for folder in COMMANDS):
            item.add_marker(pytest.mark.alone)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """The example site, with runs of this test's own."""
    return replace(load_site(str(ROOT / "examples" / "site.toml")), runs=str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """The smoke recipe's three stages over the same corpora, shrunk to a few steps of a few packs."""
    return tiny(by_name("vila_smoke"))


def tiny(recipe: Recipe, steps: int = 4) -> Recipe:
    """A recipe whose stages take a few small steps."""
    stages = tuple(
        replace(
            stage, context=256, tokens_per_step=1024, max_tiles=6, window=24, duration=Steps(count=steps), save_every=2
        )
        for stage in recipe.stages
    )
    return replace(recipe, stages=stages)


@pytest.fixture(scope="session")
def small(recipe: Recipe) -> Recipe:
    """The tiny recipe with a smaller model still: fifty steps in seconds, and so calm that rounding stays rounding."""
    model = recipe.vlm
    arch = model.tower.arch
    assert isinstance(arch, ClipVision)
    tower = replace(arch, hidden_size=32, layers=2, heads=2, intermediate_size=64)
    decoder = replace(model.lm.arch, hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=128)
    parts = replace(model, encoder=replace(model.tower, arch=tower), lm=replace(model.lm, arch=decoder))
    return replace(recipe, model=parts)


@pytest.fixture
def stream(site: Site, recipe: Recipe) -> Stream:
    """The pretrain stage's packs: pages and pairs."""
    return site.stream(recipe, recipe.stage("pretrain"))


@pytest.fixture
def packs(stream: Stream) -> PackWindows:
    return PackWindows(stream)


@pytest.fixture
def layout() -> VisionLayout:
    return VisionLayout(shape=(3, 96, 96), tokens_per_tile=36)


@pytest.fixture
def budget() -> Budget:
    return Budget(tokens=256, tiles=6)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One real S3 server for every test that needs it."""
    with running(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for every test that needs it: starting one costs seconds, a worker's imports more."""
    from cluster.local import ray_running

    with ray_running(None, 6, tmp_path_factory.mktemp("logs")):
        yield


@pytest.fixture(params=["disk", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A folder of the test's own, on each kind of storage."""
    if request.param == "disk":
        yield Place(tmp_path / "anywhere")
        return
    server: Server = request.getfixturevalue("s3")
    storage.use(server.storage)
    yield Place(f"s3://{BUCKET}/{tmp_path.name}")
    storage.use(Storage())
