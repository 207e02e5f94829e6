"""A window: planned from headers and text, cut pack by pack; what is broken is left out where it is found."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.site import Site
from mllm.recipe import Recipe
from pipelines.corpora import Pairs
from pipelines.manifest import index
from pipelines.order import Drawn, Order
from pipelines.packing import Grouping
from pipelines.types import IMAGE_TOKEN, Budget, Reason
from pipelines.windows import PackWindows, Stream
from tests.conftest import CORPUS
from tests.pipelines.shards import body


def test_packs_from_the_middle_of_a_window_are_the_same_packs(packs: PackWindows) -> None:
    whole = [pack.digest for pack in packs.packs(1)]
    assert len(whole) > 4
    assert [pack.digest for pack in packs.packs(1, first=3)] == whole[3:]


def test_a_picture_whose_body_is_broken_is_left_out_of_its_pack_and_named(stream: Stream, tmp_path: Path) -> None:
    sound, broken = tmp_path / "sound.tar", tmp_path / "broken.tar"
    with tarfile.open(CORPUS / "pairs/00000.tar") as source:
        files = [(m.name, body(source, m)) for m in source if m.isfile()]
    pictures = [name for name, _ in files if name.endswith((".jpg", ".png"))]
    for file, cut in ((sound, ()), (broken, pictures[3:5])):
        with tarfile.open(file, "w") as archive:
            for name, data in files:
                member = tarfile.TarInfo(name)
                kept = data[: len(data) // 3] if name in cut else data
                member.size = len(kept)
                archive.addfile(member, io.BytesIO(kept))
    found = {}
    for file in (sound, broken):
        manifest = index(Pairs(name="pairs"), [str(file)], str(tmp_path / "cache"))
        order = Order(seed=0, sources=(Drawn(manifest=manifest),), window_rows=manifest.rows, chunk_rows=8, epochs=1)
        one = replace(
            stream, corpora=(Pairs(name="pairs"),), order=order, budget=Budget(tokens=256, tiles=6), loss_weights=(1.0,)
        )
        found[file] = list(PackWindows(one).packs(0))
    assert [p.at for p in found[broken]] == [p.at for p in found[sound]]
    dropped = [rejected for pack in found[broken] for rejected in pack.dropped]
    assert {rejected.row.row for rejected in dropped} == {3, 4}
    assert {rejected.reason for rejected in dropped} == {Reason.TRUNCATED_IMAGE}
    trained = {row.row for pack in found[broken] for row in pack.rows}
    assert trained == {row.row for pack in found[sound] for row in pack.rows} - {3, 4}


def test_a_window_whose_rows_were_all_dropped_keeps_its_place(stream: Stream, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w") as archive:
        for row in range(3):
            member = tarfile.TarInfo(f"{row}.txt")
            archive.addfile(member, io.BytesIO())
    manifest = index(Pairs(name="pairs"), [str(tmp_path / "empty.tar")], str(tmp_path / "cache"))
    order = Order(seed=0, sources=(Drawn(manifest=manifest),), window_rows=8, chunk_rows=8, epochs=1)
    (pack,) = PackWindows(replace(stream, corpora=(Pairs(name="pairs"),), order=order, loss_weights=(1.0,))).packs(0)
    assert pack.learned == 0
    assert [rejected.reason for rejected in pack.dropped] == [Reason.MISSING_IMAGE] * 3


def test_grouped_pairs_are_one_document_and_every_row_is_told(stream: Stream, tmp_path: Path) -> None:
    manifest = index(Pairs(name="pairs"), [str(CORPUS / "pairs/00000.tar")], str(tmp_path))
    order = Order(seed=0, sources=(Drawn(manifest=manifest, group=4),), window_rows=32, chunk_rows=8, epochs=1)
    grouped = replace(
        stream, corpora=(Pairs(name="pairs"),), order=order, budget=Budget(tokens=512, tiles=8), loss_weights=(1.0,)
    )
    packs = [pack for k in range(order.windows or 0) for pack in PackWindows(grouped).packs(k)]
    assert sorted(row.row for pack in packs for row in pack.rows) == list(range(92))
    documents = [stop - start for pack in packs for start, stop in pairwise(pack.cu_seqlens)]
    assert len(documents) == 23
    assert sum(len(pack.tiles) for pack in packs) == 92


@pytest.mark.parametrize("grouping", ["mixed", "modality", "source"])
def test_packs_hold_what_their_grouping_allows(site: Site, recipe: Recipe, grouping: Grouping) -> None:
    stage = replace(recipe.stage("sft"), grouping=grouping, window=64)
    packs = list(PackWindows(site.stream(recipe, stage)).packs(0))
    sources = [set(pack.sources.tolist()) for pack in packs]
    with_pictures = [
        {bool((pack.input_ids[start:stop] == IMAGE_TOKEN).any()) for start, stop in pairwise(pack.cu_seqlens)}
        for pack in packs
    ]
    assert all(len(kinds) == 1 for kinds in with_pictures) == (grouping != "mixed")
    assert all(len(kinds) == 1 for kinds in sources) == (grouping != "mixed")  # one of the two sources has no pictures


def test_the_loss_weight_of_a_source_travels_with_its_documents(site: Site, recipe: Recipe) -> None:
    stage = recipe.stage("sft")
    first, second = stage.mixture
    stage = replace(stage, mixture=(replace(first, loss_weight=0.5), second))
    for pack in PackWindows(site.stream(recipe, stage)).packs(0):
        assert pack.weights.tolist() == [0.5 if source == 0 else 1.0 for source in pack.sources]
