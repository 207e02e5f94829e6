"""The same packs in the same order through Ray Data, from any position, dealt to any number of ranks."""

import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cluster.site import Site
from mllm.annotators import FrozenFeatures, ScoreFilter
from mllm.recipe import Epochs, Recipe
from pipelines import reach, storage
from pipelines.annotate import Annotator
from pipelines.late import tables_of
from pipelines.storage import Storage, StorageError
from pipelines.stream import dataset, from_table, hands_of, portions
from pipelines.stream import hands as made_of
from pipelines.types import Hand, Position, Reason
from pipelines.windows import PackWindows, Pools, Stream
from tests.conftest import CORPUS, ROOT
from tests.s3 import BUCKET, Proxy, Server

WINDOWS = 5
TWO = Pools(preprocessors=(2, 2))


def expected(packs: PackWindows, start: Position) -> list[tuple[Position, int]]:
    every = [p for k in range(start.window, WINDOWS) for p in packs.packs(k)]
    return [(p.at, p.digest) for p in every if p.at.window > start.window or p.at.pack >= start.pack]


def dealt(stream: Stream, start: Position, world: int, pools: Pools = TWO) -> list[list[Hand]]:
    splits = dataset(stream, start, WINDOWS, pools, world).streaming_split(world, equal=False)
    ranks: list[list[Hand]] = [[] for _ in range(world)]

    def read(rank: int) -> None:
        ranks[rank] += hands_of(tables_of(splits[rank]))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ranks


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("world", "start", "actors"), [(1, Position(), 3), (3, Position(), 2), (2, Position(window=2, pack=3), 3)]
)
def test_pack_n_of_a_window_goes_to_rank_n_mod_the_number_of_ranks(
    stream: Stream, packs: PackWindows, world: int, start: Position, actors: int
) -> None:
    """Whether actors take whole windows, as two do, or parts of them."""
    ranks = dealt(stream, start, world, Pools(preprocessors=(actors, actors)))
    order = expected(packs, start)
    assert len(order) > 6
    for rank, hands in enumerate(ranks):
        got = [(pack.at, pack.digest) for hand in hands for pack in hand.packs]
        assert got == [(at, digest) for at, digest in order if at.pack % world == rank]
        assert [(hand.window, hand.first, hand.last) for hand in hands] == [
            (hand.window, hand.first, hand.last) for hand in ranks[0]
        ]
    assert sum(hand.last - hand.first for hand in ranks[0]) == len(order)


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_made_ahead_may_be_less_than_one_pack_and_is_then_made_one_by_one(
    stream: Stream, packs: PackWindows
) -> None:
    (hands,) = dealt(stream, Position(), 1, replace(TWO, buffer=1))
    assert [(pack.at, pack.digest) for hand in hands for pack in hand.packs] == expected(packs, Position())


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("portion", [1, 200_000, 2**30])
def test_a_window_cut_into_portions_is_the_same_window(
    monkeypatch: pytest.MonkeyPatch, stream: Stream, packs: PackWindows, world: int, portion: int
) -> None:
    monkeypatch.setattr("pipelines.stream.HAND_BYTES", 1)  # one pack a hand
    monkeypatch.setattr("pipelines.stream.PORTION_BYTES", portion)
    plan = packs.plan(1, packs.rows(1))
    whole = [pack.digest for pack in packs.packs(1)]
    sent = [pickle.loads(pickle.dumps(p)) for p in portions(plan, stream, 2, world)]
    assert len(sent) > 1 if portion == 1 else len(sent) == 1 if portion == 2**30 else sent
    dealt = [from_table(table, 0) for each in sent for table in made_of(packs, each)]
    for rank in range(world):
        got = [pack for hand in dealt[rank::world] for pack in hand.packs]
        numbers = [n for n in range(2, plan.packs) if n % world == rank]
        assert [pack.at.pack for pack in got] == sorted(numbers, key=lambda n: (n - 2) // world)
        assert [pack.digest for pack in got] == [whole[pack.at.pack] for pack in got]


@pytest.mark.usefixtures("ray_cluster")
def test_models_in_the_pipeline_change_neither_order_nor_deal(stream: Stream, recipe: Recipe, tmp_path: Path) -> None:
    """A filter of rows and features of packs, each on one actor or two, give what they give in this process."""
    annotated = replace(stream, annotators=models(recipe, tmp_path))
    every = [pack for k in range(WINDOWS) for pack in PackWindows(annotated).packs(k)]
    assert any(dropped.reason is Reason.FILTERED for pack in every for dropped in pack.dropped)
    assert any(len(pack.cuts) for pack in every)
    ranks = dealt(annotated, Position(), 2, Pools(preprocessors=(1, 2), annotators=(1, 2)))
    for rank, hands in enumerate(ranks):
        got = [pack for hand in hands for pack in hand.packs]
        wanted = [pack for pack in every if pack.at.pack % 2 == rank]
        assert [(pack.at, pack.digest, pack.rows, pack.dropped) for pack in got] == [
            (pack.at, pack.digest, pack.rows, pack.dropped) for pack in wanted
        ]
        for pack, same in zip(got, wanted, strict=True):
            assert len(pack.tiles) == 0
            assert pack.features is not None
            assert same.features is not None
            assert pack.features.shape == same.features.shape
            # Actors have one thread and this process several: sums of floats may end otherwise in their last bit.
            assert np.abs(bfloat16(pack.features) - bfloat16(same.features)).max(initial=0) < 0.05


def models(recipe: Recipe, folder: Path) -> tuple[Annotator, ...]:
    """A filter that drops a part of the rows, and the features of the recipe's own tower, of random weights."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "clip")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    tower: Any = recipe.vlm.build().encoder.tower
    tower.tower.save_pretrained(folder / "tower")
    frozen = replace(recipe.vlm.tower, weights=str(folder / "tower"))
    return ScoreFilter(weights=str(folder / "clip"), at_least=0.0), FrozenFeatures(encoder=frozen)


def bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def uploaded(s3: Server) -> Server:
    """The S3 server with the example corpus on it."""
    s3.upload(CORPUS, "examples")
    return s3


def moved(site: Site, how: Storage, cache: Path) -> Site:
    """The site whose corpora lie on S3."""
    corpora = {
        name: [uri.replace(str(CORPUS), f"s3://{BUCKET}/examples") for uri in site.shards(name)]
        for name in site.corpora
    }
    storage.use(how)
    return replace(site, corpora=corpora, storage=how, cache=str(cache))


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    storage.use(Storage())


@pytest.mark.usefixtures("ray_cluster", "as_before")
def test_a_corpus_on_s3_gives_the_packs_that_it_gives_on_disk(
    stream: Stream, packs: PackWindows, site: Site, recipe: Recipe, uploaded: Server, tmp_path: Path
) -> None:
    """Also the order's fingerprint is the same: a run may go on after its corpora have moved."""
    remote = moved(site, uploaded.storage, tmp_path / "cache").stream(recipe, recipe.stage("pretrain"))
    assert {shard.uri[:5] for source in remote.order.sources for shard in source.manifest.shards} == {"s3://"}
    assert remote.order.fingerprint == stream.order.fingerprint
    (hands,) = dealt(remote, Position(), 1)
    storage.use(Storage())
    assert [(pack.at, pack.digest) for hand in hands for pack in hand.packs] == expected(packs, Position())


@pytest.mark.usefixtures("as_before")
def test_a_storm_of_faults_changes_neither_rows_nor_order_and_an_outage_stops_the_stream(
    stream: Stream, site: Site, recipe: Recipe, uploaded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "PAUSE", 0.02)
    remote = moved(site, uploaded.storage, tmp_path / "cache").stream(recipe, recipe.stage("pretrain"))
    proxy = Proxy(uploaded.port, faults=["", "503", "", "", "truncate", "", "refuse"] * 60)
    shaky = PackWindows(replace(remote, storage=proxy.storage()))
    got = [(pack.digest, pack.rows, pack.dropped) for k in range(3) for pack in shaky.packs(k)]
    assert {"503", "truncate", "refuse"} <= set(proxy.met)
    proxy.faults[:] = ["503"] * 500
    with pytest.raises(StorageError, match="not the data"):
        list(shaky.packs(4))
    proxy.close()
    storage.use(Storage())
    assert got == [(p.digest, p.rows, p.dropped) for k in range(3) for p in PackWindows(stream).packs(k)]


def test_a_window_packs_the_same_whoever_asks(stream: Stream) -> None:
    once, again = (PackWindows(stream).packs(3) for _ in range(2))
    assert [p.digest for p in once] == [p.digest for p in again]
    assert [p.rows for p in once] == [p.rows for p in again]


def test_an_epoch_trains_every_row_once(site: Site, recipe: Recipe) -> None:
    stage = recipe.stage("pretrain")
    by_size = replace(stage, duration=Epochs(), mixture=tuple(replace(source, weight=None) for source in stage.mixture))
    once = site.stream(recipe, by_size)
    assert once.windows
    packs = [pack for k in range(once.windows) for pack in PackWindows(once).packs(k)]
    rows = [(row.corpus, row.shard, row.row) for pack in packs for row in pack.rows if row.piece == 0]
    assert len(rows) == len(set(rows)) == once.order.rows
    assert not any(pack.dropped for pack in packs)


def test_where_trainers_leave_no_room_the_actors_hold_no_cpus() -> None:
    """Trainers that fill a cluster would otherwise wait for packs that nobody can make, for ever."""
    pools = Pools(preprocessors=(2, 4), annotators=(1, 1))
    assert [pools.within(cpus).cpus for cpus in (0, 2, 3, 9)] == [0, 0, 1, 1]
    assert replace(pools, gpus=0.5).within(2).cpus == 1
    assert replace(pools, cpus=0.5).within(2).cpus == 0.5
