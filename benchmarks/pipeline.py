"""Images a second that reach a trainer, beside the same cores doing nothing but decoding.

The limit is a bare loop: one plain process a core reads the same tar files in order, decodes and pads each picture, and hands
nothing over. Between the two stands `PackWindows` in plain processes (shuffled range reads, tokens, packing, but no Ray), so
that the difference has a place. Fair because: the same files in the page cache, the same `ops.images`, one torch thread a
process, as many processes as cores in all three, all as nice as Ray makes its workers. The consumer, which unpickles every
pack, has no core of its own. The rate is that after the first quarter of the windows.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import simplejpeg
import torch

from benchmarks.common import Section, cores, ratios, scratch
from cluster.local import ray_running
from cluster.site import EXAMPLE, load_site
from ops import images
from pipelines.chat import ChatML
from pipelines.corpora import IMAGE_SUFFIXES, Pairs
from pipelines.manifest import index
from pipelines.order import Drawn, Order
from pipelines.stream import dataset, hands_of
from pipelines.tiling import Pad
from pipelines.types import Budget, Position, VisionLayout
from pipelines.windows import PackWindows, Pools, Stream, single_threaded

TILING = Pad(size=336)
WINDOW = 128
NICE = 15  # Ray's worker_niceness: on a machine that others use too, plain processes would win by rank alone
Events = list[tuple[float, int]]
"""When a window was done, on the clock that all processes share, and its images."""


def make_corpus(folder: Path, shards: int) -> list[str]:
    """Tars of `WINDOW` rows each: the example corpus's pictures, enlarged to 568 x 566, JPEG quality 90, with captions."""
    pairs: list[tuple[bytes, bytes]] = []
    for uri in load_site(str(EXAMPLE)).shards("example-pairs"):
        with tarfile.open(uri) as archive:
            files = {m.name: archive.extractfile(m) for m in archive if m.isfile()}
            for name, body in files.items():
                stem, _, suffix = name.partition(".")
                caption = files.get(f"{stem}.txt")
                if suffix in IMAGE_SUFFIXES and body and caption:
                    large = images.resize(images.decode(body.read()), 566, 568).permute(1, 2, 0).contiguous().numpy()
                    pairs.append((simplejpeg.encode_jpeg(large, quality=90), caption.read()))
    source = cycle(pairs)
    uris = []
    for shard in range(shards):
        uris.append(str(folder / f"{shard:05d}.tar"))
        with tarfile.open(uris[-1], "w", format=tarfile.USTAR_FORMAT) as archive:
            for row in range(WINDOW):
                picture, caption = next(source)
                key = f"{shard:05d}{row:04d}"
                words = json.dumps({"caption": caption.decode(), "key": key}).encode()
                for suffix, data in (("jpg", picture), ("txt", caption), ("json", words)):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return uris


def make_stream(folder: Path, uris: list[str]) -> Stream:
    corpus = Pairs(name="enlarged")
    manifest = index(corpus, uris, str(folder / "manifests"))
    return Stream(
        order=Order(seed=0, sources=(Drawn(manifest=manifest),), window_rows=WINDOW),
        corpora=(corpus,),
        tiling=TILING,
        template=ChatML(),
        layout=VisionLayout(shape=(3, 336, 336), tokens_per_tile=576),
        budget=Budget(tokens=4096, tiles=8),
        tokenizer=load_site(str(EXAMPLE)).folder("example-bpe"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        loss_weights=(1.0,),
    )


def bare(stream: Stream, windows: range) -> Iterator[int]:
    """Shard after shard: read, decode, pad, forget."""
    shards = stream.order.sources[0].manifest.shards
    for k in windows:
        count = 0
        with tarfile.open(shards[k % len(shards)].uri) as archive:
            for member in archive:
                body = archive.extractfile(member) if member.name.endswith(".jpg") else None
                if body:
                    data = body.read()
                    cut = TILING.cut(*images.header(data))
                    TILING.tile(images.decode(data, TILING.target(cut)), cut)
                    count += 1
        yield count


def packed(stream: Stream, windows: range) -> Iterator[int]:
    packs = PackWindows(stream)
    for k in windows:
        yield sum(len(pack.tiles) for pack in packs.packs(k))


Work = Callable[[Stream, range], Iterator[int]]


def _process(work: Work, stream: Stream, windows: range, ready: Any, results: Any) -> None:
    single_threaded()
    os.nice(NICE)
    ready.wait()
    results.put([(time.monotonic(), count) for count in work(stream, windows)])


def in_processes(work: Work, stream: Stream, windows: int) -> Events:
    """`work` over windows dealt to one plain process a core, which start together once all have imported."""
    context = multiprocessing.get_context("spawn")
    world = cores()
    ready, results = context.Barrier(world), context.SimpleQueue()
    processes = [
        context.Process(target=_process, args=(work, stream, range(rank, windows, world), ready, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    events: Events = [event for _ in processes for event in results.get()]
    for process in processes:
        process.join()
    return sorted(events)


def through_ray(stream: Stream, windows: int, logs: Path) -> tuple[Events, float]:
    """A fresh local Ray, gone afterwards, so that its daemons take nothing from the other variants."""
    events: Events = []
    first = 0.0
    with ray_running(None, cores() + 1, logs):
        started = time.monotonic()
        count = 0
        for pack in (
            p
            for h in hands_of(
                dataset(stream, Position(), windows, Pools(preprocessors=(cores(), cores())), 1).iterator()
            )
            for p in h.packs
        ):
            first = first or time.monotonic() - started
            count += len(pack.tiles)
            if pack.at.pack == pack.of - 1:
                events.append((time.monotonic(), count))
                count = 0
    return events, first


def rate(events: Events) -> float:
    """Images a second after the first quarter of the windows, cut where every process has done equally many."""
    cut = -(-len(events) // (4 * cores())) * cores()
    return sum(count for _, count in events[cut:]) / (events[-1][0] - events[cut - 1][0])


def measure(section: Section, quick: bool) -> None:
    torch.set_num_threads(cores())
    shards, windows, repetitions = (4, 4 * cores(), 1) if quick else (12, 12 * cores(), 3)
    limits: list[float] = []
    plain: list[float] = []
    rayed: list[float] = []
    firsts: list[float] = []
    with scratch() as folder:
        uris = make_corpus(folder, shards)
        stream = make_stream(folder, uris)
        size = sum(Path(uri).stat().st_size for uri in uris) / shards / WINDOW
        section.facts.append(
            f"{shards * WINDOW} rows, read {windows / shards:g} times; pictures are the example corpus's, enlarged to 568 x 566 "
            f"({size / 1024:.0f} KiB a row: smoother than photographs of that size, so decoding is cheap, all else weighs more)"
        )
        for _ in range(repetitions):
            limits.append(rate(in_processes(bare, stream, windows)))
            plain.append(rate(in_processes(packed, stream, windows)))
            events, first = through_ray(stream, windows, folder / "logs")
            rayed.append(rate(events))
            firsts.append(first)
    section.add("bare loop: read, decode, pad", "images/s", limits, "the limit")
    section.add("PackWindows in plain processes", "images/s", plain)
    section.add("pipelines.stream through Ray", "images/s", rayed, "consumed in the driver")
    section.add("PackWindows / bare", "ratio", ratios(plain, limits))
    section.add("Ray / PackWindows", "ratio", ratios(rayed, plain), "what handing over costs")
    section.add("Ray / bare", "ratio", ratios(rayed, limits))
    section.add("first pack after Ray is up", "s", firsts, f"a window of {WINDOW} rows is made first")
