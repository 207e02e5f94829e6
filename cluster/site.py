"""Where things are and how much of the machine may be used: the only file that a person writes.

    # site.toml; paths are relative to it
    runs = "runs"
    workers = 2                             # or [2, 8]: as many as there are nodes for
    ray_address = "head:6379"               # without it a local Ray is started
    ray_token_file = "/secrets/ray"         # where that cluster asks for a token
    jobs = "http://head:8265"               # its job server and dashboard, for `mllm submit`
    sinks = ["tensorboard"]                 # beside Ray's metrics: "tensorboard", "wandb" (offline unless WANDB_MODE says so)
    gpus = true                             # trainers have GPUs, though the machine that drives them has none
    grows = true                            # the cluster gets nodes when they are asked for: too few now stop nothing
    trust_remote_code = true                # only where the Python beside the weights has been read

    [corpora]
    mmc4-core = "s3://bucket/mmc4/docs_shard_{0..5999}_v3.jsonl"

    [storage]                               # only where the usual AWS chain does not say it
    endpoint = "http://storage.local:8333"

    [watch]                                 # when a rank counts as hung, and how often a run tries again
    least = 60

    [limits]                                # what one row may ask of a machine
    pixels = 50_000_000

    [weights]
    "lmsys/vicuna-7b-v1.5" = "/models/vicuna-7b-v1.5"

    [serve]                                 # for `mllm serve` (docs/serving.md), which only this machine reaches by default
    host = "0.0.0.0"

    [deploy.trainers]                       # nodes, for `mllm manifest` alone (docs/cluster.md)
    gpus = 8

A recipe names corpora and weights; the site says where they lie. Weights that it does not list are taken from the hub.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import fsspec
from pydantic import Field, TypeAdapter, ValidationError

from cluster.manifests.words import Deploy
from cluster.policy import Watch
from mllm.annotators import Recaption, ReferenceLogProbs, ScoreFilter
from mllm.recipe import Recipe, Stage
from pipelines import storage, trust
from pipelines.corpora import Corpus, Preferences
from pipelines.manifest import Manifest, beside, expand, index
from pipelines.order import Drawn, Order
from pipelines.storage import Storage
from pipelines.types import CONVERSATION, ConversationLimits, Limits, spec
from pipelines.windows import Pools, Stream

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "site.toml"


class SiteError(ValueError):
    """The site does not have what a recipe needs; the message names both."""


Positive = Annotated[int, Field(ge=1)]
Actors = Positive | tuple[Positive, Positive]
"""So many actors, or from so few to so many as Ray Data finds it needs."""


Sink = Literal["tensorboard", "wandb"]
"""Where a run's numbers go besides its own files and Ray's metrics."""


@spec
class Annotators:
    """Actors that hold the models of a recipe's annotators, and the share of a GPU that each may have."""

    actors: Actors = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0


@spec
class Serving:
    """How a model is served. `host` is the address to listen at: the default reaches no other machine.

    A replica writes `together` answers at a time while `waiting` wait; what comes beyond is told to come again. `request_bytes`
    is the most that one request may have, `limits` what its pictures and its text may; `gpus` what a replica holds of them.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    replicas: Positive = 1
    together: Positive = 16
    waiting: Positive = 256
    request_bytes: Positive = 32 * 2**20
    limits: ConversationLimits = CONVERSATION
    gpus: Annotated[float, Field(ge=0)] = 0.0


@spec
class Site:
    """`runs` and `cache` are folders, on a disk that all nodes share or on S3; `workers` trainers, from the fewest to the most
    that a run may have where two numbers are given, `preprocessors` and `annotators` actors.

    `buffer` is how many bytes of packs may be made ahead of the trainers. `ray_address` None starts a local Ray. `watch` says
    how long a run waits before it calls something hung, and how often it tries again.

    `trust_remote_code` runs the Python that lies beside weights of the encoder and the language model, with all the rights of a
    worker; without it such weights are refused. `ray_token_file` is a file with the token that the cluster at `ray_address` asks
    for: its path travels, its content does not. `jobs` is the address of a cluster's job server, which runs are submitted to.

    `gpus` says whether trainers have GPUs, for a head that has none itself; None is "as the machine that drives the run".
    `grows` says that nodes come when a run waits for them (an autoscaler, a queue): it may begin before they are there.
    `serve` is how `mllm serve` serves, and `deploy` what `mllm manifest` needs to know of nodes.
    """

    runs: str = "runs"
    cache: str = ".cache/mllm"
    workers: Actors = 1
    preprocessors: Actors = 1
    annotators: Annotators = Annotators()
    buffer: Positive = 2**30
    gpus: bool | None = None
    grows: bool = False
    ray_address: str | None = None
    ray_token_file: str | None = None
    jobs: str | None = None
    sinks: tuple[Sink, ...] = ()
    trust_remote_code: bool = False
    storage: Storage = Storage()
    limits: Limits = Limits()
    corpora: dict[str, str | list[str]] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    watch: Watch = Watch()
    serve: Serving = Serving()
    deploy: Deploy | None = None

    @property
    def world(self) -> tuple[int, int]:
        """The fewest and the most training workers; the same number where a run has always as many."""
        return _range(self.workers)

    @property
    def pools(self) -> Pools:
        """The actors that make packs."""
        return Pools(
            preprocessors=_range(self.preprocessors),
            annotators=_range(self.annotators.actors),
            gpus=self.annotators.gpus,
            buffer=self.buffer,
        )

    def cpus(self, recipe: Recipe) -> int:
        """Logical CPUs that a run of `recipe` needs of a Ray of its own."""
        annotators = self.pools.annotators[1] if any(stage.annotators for stage in recipe.stages) else 0
        return self.world[1] + self.pools.preprocessors[1] + 2 * annotators + 1

    def folder(self, name: str) -> str:
        """The folder (or hub id) of weights or a tokenizer by its name in a recipe."""
        return self.weights.get(name, name)

    def shards(self, corpus: str) -> list[str]:
        """Addresses of a corpus's shards. Raises SiteError naming the corpora that the site does have."""
        if corpus not in self.corpora:
            raise SiteError(
                f"the recipe reads corpus {corpus!r} and the site has {sorted(self.corpora) or 'none'}; "
                "add it under [corpora] in the site file"
            )
        patterns = self.corpora[corpus]
        found = []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            _check_address(corpus, pattern)
            try:
                found += expand(pattern)
            except FileNotFoundError as error:
                raise SiteError(f"corpus {corpus!r}: {error}; check its path under [corpora]") from error
        return found

    def homes(self, uris: Sequence[str]) -> tuple[str, str]:
        """Where a corpus's index may lie: in the corpus's own folder, or in the site's cache, which new ones are written to."""
        return beside(uris[0]), f"{self.cache}/manifests"

    def manifest(self, corpus: Corpus) -> Manifest:
        """Index of a corpus; shards that no home knows are scanned. Raises SiteError when a shard is missing."""
        uris = self.shards(corpus.name)
        try:
            return index(corpus, uris, *self.homes(uris))
        except FileNotFoundError as error:
            raise SiteError(str(error)) from error

    def stream(self, recipe: Recipe, stage: Stage) -> Stream:
        """The packs of a stage, as a value. Raises SiteError for a corpus or tokenizer that is not there."""
        from mllm.recipe import Epochs

        order = Order(
            seed=recipe.seed,
            sources=tuple(source.drawn(self.manifest(source.corpus)) for source in stage.mixture),
            sampling=stage.drawing,
            window_rows=stage.window,
            chunk_rows=stage.chunk,
            epochs=stage.duration.count if isinstance(stage.duration, Epochs) else None,
        )
        weights = tuple(source.loss_weight for source in stage.mixture)
        return self._stream(recipe, stage, order, tuple(source.corpus for source in stage.mixture), weights)

    def held_out(self, recipe: Recipe, stage: Stage) -> Stream | None:
        """The held-out packs, read once in order, whole; None when the recipe holds nothing out."""
        if not recipe.held_out:
            return None
        sources = tuple(Drawn(manifest=self.manifest(corpus)) for corpus in recipe.held_out)
        order = Order(seed=0, sources=sources, window_rows=64, chunk_rows=64, epochs=1.0)
        # Held-out losses of two stages compare only over the same rows: nothing is filtered or rewritten here. And where no two
        # answers are compared, an objective that would is scored as one of the next token, which needs no reference.
        compared = any(isinstance(corpus, Preferences) for corpus in recipe.held_out)
        needless = ScoreFilter | Recaption if compared else ScoreFilter | Recaption | ReferenceLogProbs
        stage = replace(stage, annotators=tuple(a for a in stage.annotators if not isinstance(a, needless)))
        return self._stream(recipe, stage, order, recipe.held_out, (1.0,) * len(sources))

    def _stream(
        self, recipe: Recipe, stage: Stage, order: Order, corpora: tuple[Corpus, ...], weights: tuple[float, ...]
    ) -> Stream:
        words = recipe.model.words
        tokenizer = self.folder(words.tokenizer) if words.tokenizer else ""
        if words.tokenizer and not (Path(tokenizer) / "tokenizer.json").is_file():
            raise SiteError(
                f"the recipe's tokenizer {words.tokenizer!r} should be a folder with a tokenizer.json and {tokenizer} is none; "
                "map it under [weights] in the site file"
            )
        tiling = recipe.tiling_of(stage)
        return Stream(
            order=order,
            corpora=corpora,
            tiling=tiling,
            template=words.chat,
            layout=recipe.model.layout(tiling),
            budget=stage.budget,
            tokenizer=tokenizer,
            bos=words.bos,
            eos=words.eos,
            loss_weights=weights,
            limits=self.limits,
            storage=self.storage,
            grouping=stage.grouping,
            annotators=stage.annotators,
            folders=self.weights,
            trust_remote_code=self.trust_remote_code,
        )


def _range(actors: Actors) -> tuple[int, int]:
    return (actors, actors) if isinstance(actors, int) else actors


def _check_address(corpus: str, address: str) -> None:
    scheme = address.split("://", 1)[0] if "://" in address else "file"
    if scheme not in fsspec.available_protocols():
        raise SiteError(
            f"corpus {corpus!r}: {address} has the scheme {scheme!r}, which no storage here speaks; "
            "expected a path, file://, s3://, gs:// or https://"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise SiteError(f"corpus {corpus!r}: {address} cannot be read here: {error}") from error


@cache
def _adapter() -> TypeAdapter[Site]:
    return TypeAdapter(Site)


def load_site(path: str | None = None, workers: Actors | None = None) -> Site:
    """The site from `path`, or $MLLM_SITE, or ./site.toml, or the example corpus that comes with the project.

    Raises SiteError when the file is missing or says something that a site does not have.
    """
    named = path or os.environ.get("MLLM_SITE")
    file = Path(named) if named else Path("site.toml")
    if not file.is_file():
        if named:
            raise SiteError(f"no site file {file}; write one, or leave --site away for the example corpus")
        file = EXAMPLE
    if not file.is_file():
        raise SiteError("no site.toml here and no example corpus beside the package; name a site file with --site")
    try:
        text = file.read_text(encoding="utf-8")
        # As JSON a site travels to a cluster; people write TOML.
        site = (
            _adapter().validate_json(text)
            if file.suffix == ".json"
            else _adapter().validate_python(tomllib.loads(text))
        )
    except tomllib.TOMLDecodeError as error:
        raise SiteError(f"{file}: {error}") from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, f['loc']))}: {f['msg'].removeprefix('Value error, ')}" for f in error.errors()
        )
        raise SiteError(f"{file}: {faults}") from error
    site = _absolute(site, file.parent)
    storage.use(site.storage)
    trust.use(site.trust_remote_code)
    return site if workers is None else replace(site, workers=workers)


def _absolute(site: Site, root: Path) -> Site:
    def place(path: str) -> str:
        return path if "://" in path or Path(path).is_absolute() else str((root / path).resolve())

    def places(paths: str | list[str]) -> str | list[str]:
        return place(paths) if isinstance(paths, str) else [place(path) for path in paths]

    if storage.scheme(site.runs) not in ("file", "s3"):
        raise SiteError(
            f"runs={site.runs!r}: a run is kept on a disk that all nodes share, or on S3; expected a path or s3://"
        )
    if site.ray_token_file is not None and not (site.ray_address or site.jobs):
        raise SiteError(
            "ray_token_file is for a cluster that asks for a token, and there is no ray_address and no jobs; a Ray that is "
            "started here listens to this machine alone; add ray_address or jobs, or take ray_token_file away"
        )
    if site.jobs is not None and not site.jobs.startswith(("http://", "https://")):
        raise SiteError(f"jobs={site.jobs!r}: expected the dashboard's address, as http://HEAD:8265")
    return replace(
        site,
        runs=place(site.runs.removeprefix("file://")),
        cache=place(site.cache),
        ray_token_file=None if site.ray_token_file is None else place(site.ray_token_file),
        corpora={name: places(paths) for name, paths in site.corpora.items()},
        weights={name: place(path) for name, path in site.weights.items()},
    )
