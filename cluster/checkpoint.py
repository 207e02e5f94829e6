"""Checkpoints: shards that any number of workers loads, and a manifest written last, on a disk or S3.

runs/NAME/checkpoints/STAGE/step-000040-7/     step 40, written under the controller's token 7 (none where it is 0)
    __0_0.bin ...    weights and optimiser, sharded (`cluster/shards.py`)
    index.json       what lies where in them, with digests
    state.json       TrainState: step, tokens, progress, position in the data, tally of rows
    manifest.json    Manifest: there only when everything else is
    rejected.json    there when a reader found a file that is not what was written

A folder without a whole manifest, or whose files are not those that it lists, is passed over with the reason.

Here is all that is known of a checkpoint without its tensors, and nothing that takes long to import; `cluster/loading.py` reads
those.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import field, replace
from functools import cache
from typing import Any

import xxhash
from pydantic import TypeAdapter, ValidationError

from pipelines.place import Place
from pipelines.types import Position, spec

MANIFEST, STATE, INDEX, REJECTED = "manifest.json", "state.json", "index.json", "rejected.json"
HELD = "held.txt"


FORMAT = 2
"""Of a checkpoint's files. 1 had pickles, or SHA-256."""


@spec
class ShardTally:
    """Rows of one shard that were met and dropped so far."""

    seen: int = 0
    dropped: int = 0


@spec
class TrainState:
    """Where a stage stands after `step` steps; `position` is the next pack to train on.

    `recent` are loss and gradient norm of the last steps that were taken, as far as a guard against spikes looks back.
    """

    step: int = 0
    tokens: int = 0
    progress: float = 0.0
    position: Position = Position()
    shards: dict[str, ShardTally] = field(default_factory=dict)
    recent: tuple[tuple[float, float], ...] = ()

    def advanced(self, tokens: int, progress: float, position: Position, shards: dict[str, ShardTally]) -> TrainState:
        return replace(
            self, step=self.step + 1, tokens=self.tokens + tokens, progress=progress, position=position, shards=shards
        )


@spec
class FileMark:
    """Bytes of a file, and its digest where the index has none of its pieces."""

    size: int
    digest: str | None = None


@spec
class Manifest:
    """What a checkpoint is of. `fingerprint` names the stage, `order` the data's order, `world` the ranks that wrote it.

    `token` is the fencing token of the controller under which it was written; `time` is seconds since 1970. The last five are
    filled in by who writes it.
    """

    format: int = FORMAT
    run: str
    stage: str
    fingerprint: str
    order: str
    step: int
    world: int
    final: bool
    versions: dict[str, str]
    token: int = 0
    progress: float = 0.0
    tokens: int = 0
    time: float = 0.0
    files: dict[str, FileMark] = field(default_factory=dict)


@spec
class Found:
    """A whole checkpoint."""

    folder: Place
    manifest: Manifest


@spec
class PassedOver:
    """A checkpoint that is not taken, and why."""

    folder: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.folder.name} is passed over: {self.reason}"


class CorruptCheckpoint(RuntimeError):
    """A file of a checkpoint is not what was written. `tensor` is the one that lies there, where that is known."""

    def __init__(self, folder: str, file: str, tensor: str | None, why: str) -> None:
        super().__init__(folder, file, tensor, why)
        self.folder, self.file, self.tensor, self.why = folder, file, tensor, why

    def __str__(self) -> str:
        of = f", of {self.tensor}," if self.tensor else ""
        return (
            f"{self.folder}: {self.file}{of} {self.why}; the storage lost or changed it since it was written. "
            "Whoever goes on takes the checkpoint before it"
        )


class OldCheckpoint(ValueError):
    """A checkpoint of a version whose files are not read, any more or yet."""


@cache
def _manifests() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


@cache
def _states() -> TypeAdapter[TrainState]:
    return TypeAdapter(TrainState)


def dump_manifest(manifest: Manifest) -> bytes:
    return _manifests().dump_json(manifest, indent=1)


def dump_state(at: TrainState) -> bytes:
    return _states().dump_json(at, indent=1)


def folder_name(step: int, token: int = 0) -> str:
    """A step that is written again under another token gets another folder: the two writers' files never mix."""
    return f"step-{step:06d}" + (f"-{token}" if token else "")


def step_and_token(name: str) -> tuple[int, int] | None:
    """What `folder_name` was given; None for other names."""
    found = re.fullmatch(r"step-(\d{6,})(?:-(\d+))?", name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def attempts(folder: Place) -> list[Place]:
    """All checkpoints of a stage, whole or not, oldest first."""
    known = {name: at for name in folder.names() if (at := step_and_token(name))}
    return [folder / name for name in sorted(known, key=lambda name: known[name])]


def checkpoints(folder: Place) -> list[Place]:
    """Whole checkpoints of a stage, oldest first."""
    return [each for each in attempts(folder) if isinstance(examine(each), Manifest)]


def examine(folder: Place) -> Manifest | str:
    """A checkpoint's manifest, or why it is not whole: by one listing and its small files, reading no tensor.

    Raises OldCheckpoint.
    """
    sizes = folder.sizes()
    if MANIFEST not in sizes:
        return "it has no manifest, so its writing was cut off"
    if REJECTED in sizes:
        return _rejection(folder)
    try:
        manifest = read_manifest(folder)
    except ValidationError as error:
        return f"its manifest cannot be read ({error.errors()[0]['msg']})"
    for name, mark in manifest.files.items():
        if name not in sizes:
            return f"{name} is gone"
        if sizes[name] != mark.size:
            return f"{name} has {sizes[name]:,} of {mark.size:,} bytes"
    return manifest


def _rejection(folder: Place) -> str:
    try:
        return str(json.loads((folder / REJECTED).read_bytes())["reason"])
    except (ValueError, KeyError, TypeError):
        return "it was rejected"


def reject(folder: Place, reason: str) -> None:
    """Mark a checkpoint that turned out not to be what was written, so that nobody takes it again."""
    (folder / REJECTED).write(json.dumps({"reason": reason, "time": time.time()}, indent=1).encode())


def newest(
    folder: Place, fingerprint: str, order: str, tell: Callable[[PassedOver], object] = lambda _: None
) -> Found | None:
    """The stage's whole checkpoint of the highest step, and token; None where there is none: the stage begins anew.

    `tell` hears of each newer one that is passed over. Raises ValueError when the checkpoint was written by another stage or
    another order, since going on from it would change what was learned, or by a version whose files are not read any more.
    """
    for candidate in reversed(attempts(folder)):
        manifest = examine(candidate)
        if isinstance(manifest, str):
            tell(PassedOver(folder=candidate, reason=manifest))
            continue
        if manifest.fingerprint != fingerprint:
            raise ValueError(
                f"{candidate} belongs to stage {manifest.fingerprint} and the recipe now says {fingerprint}: "
                "the recipe was changed; train under another --run, or put the recipe back"
            )
        if manifest.order != order:
            raise ValueError(
                f"{candidate} follows the data order {manifest.order} and the corpora now give {order}: a shard was changed, "
                "added or removed; put it back, or train under another --run"
            )
        return Found(folder=candidate, manifest=manifest)
    return None


@spec
class Attempt:
    """A checkpoint's folder as retention sees it."""

    name: str
    step: int
    token: int
    whole: bool


def removable(attempts: Iterable[Attempt], keep: int, protected: Collection[str], token: int) -> list[str]:
    """Names of those that a writer with `token` may take away, having written a whole one.

    All that are older than the newest whole one, but for the `keep` newest whole ones and the `protected`. Where another writer
    has a higher token this one has no say any more.
    """
    ordered = sorted(attempts, key=lambda each: (each.step, each.token))
    whole = [each.name for each in ordered if each.whole]
    if not whole or any(each.token > token for each in ordered):
        return []
    kept = {*whole[-max(1, keep) :], *protected}
    names = [each.name for each in ordered]
    return [name for name in names[: names.index(whole[-1])] if name not in kept]


def hold(folder: Place, name: str) -> None:
    """Keep one of a stage's checkpoints from being taken away while it is read beside training; an empty `name` lets go of it."""
    (folder / HELD).write(name.encode())


def held(folder: Place) -> str:
    """The name of the checkpoint that `hold` keeps, or an empty one."""
    try:
        return (folder / HELD).read_bytes().decode()
    except FileNotFoundError:
        return ""


def retain(folder: Place, keep: int, protected: Collection[str], token: int) -> None:
    """Take away what `removable` names, the manifest first: what is left half removed is never taken for whole.

    What somebody reads at the moment is left, see `hold`.
    """
    protected = {*protected, held(folder)}
    found: list[Attempt] = []
    for place in attempts(folder):
        step, of = step_and_token(place.name) or (0, 0)
        found.append(Attempt(name=place.name, step=step, token=of, whole=_is_whole(place)))
    for name in removable(found, keep, protected, token):
        discard(folder / name)


def _is_whole(folder: Place) -> bool:
    try:
        return isinstance(examine(folder), Manifest)
    except OldCheckpoint:
        return False


def discard(folder: Place) -> None:
    """Take a checkpoint away, its manifest first."""
    (folder / MANIFEST).remove()
    folder.remove()


def read_manifest(folder: Place) -> Manifest:
    """Raises pydantic's ValidationError, a ValueError, for one that is none; OldCheckpoint; FileNotFoundError."""
    data = (folder / MANIFEST).read_bytes()
    told: Any = None
    with suppress(ValueError):  # of what is no JSON the last line tells
        told = json.loads(data)
    if isinstance(told, dict) and "fingerprint" in told and told.get("format", 1) != FORMAT:
        raise _of_another_format(folder, told)
    return _manifests().validate_json(data)


def _of_another_format(folder: Place, told: dict[str, Any]) -> OldCheckpoint:
    versions = told.get("versions", {})
    wrote = ", ".join(f"{name} {versions[name]}" for name in ("mllm", "torch") if name in versions)
    return OldCheckpoint(
        f"{folder} was written in format {told.get('format', 1)} by another version ({wrote or 'it does not say which'}), and "
        f"this one reads format {FORMAT}; go on with the version that wrote it, or train the stage again (remove the folder, "
        "or take another --run)"
    )


def read_state(folder: Place) -> TrainState:
    """Raises CorruptCheckpoint when it is not what was written."""
    return _states().validate_json(checked(folder, STATE))


def checked(folder: Place, name: str) -> bytes:
    """A small file, whose digest the manifest has. Raises CorruptCheckpoint when it is not what was written."""
    try:
        expected = read_manifest(folder).files[name]
    except ValidationError:
        raise CorruptCheckpoint(folder.uri, MANIFEST, None, "cannot be read") from None
    try:
        data = (folder / name).read_bytes()
    except FileNotFoundError:
        raise CorruptCheckpoint(folder.uri, name, None, "is not there") from None
    if digest(data) != expected.digest:
        raise CorruptCheckpoint(folder.uri, name, None, "has other bytes than were written")
    return data


Digest = xxhash.xxh3_128
"""A digest that takes bytes as they come; its `hexdigest()` is what `digest` says of all of them."""


def digest(data: bytes | memoryview) -> str:
    """XXH3 of 128 bits, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)
