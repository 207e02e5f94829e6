"""A file or a folder by its address, on a disk or on S3, with those verbs of pathlib that storage knows.

    run = Place("s3://bucket/runs/vila_7b")
    (run / "recipe.json").write(text.encode())

What is written is written whole, and every request is as patient as `pipelines.storage` says.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipelines import storage


class Place:
    """An address. Two of the same address are equal; nothing is asked of storage before a verb is used."""

    __slots__ = ("uri",)

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri).removeprefix("file://").rstrip("/")

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"Place({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __fspath__(self) -> str:
        """The path, for libraries that read files of their own. Raises TypeError for a place on no disk."""
        if not self.local:
            raise TypeError(f"{self.uri} is no path on a disk")
        return self.uri

    @property
    def local(self) -> bool:
        return storage.scheme(self.uri) == "file"

    @property
    def path(self) -> Path:
        return Path(self)

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Place:
        return Place(self.uri.rsplit("/", 1)[0])

    def under(self, root: Place) -> str:
        """This address as seen from `root`, which must contain it."""
        return self.uri.removeprefix(f"{root.uri}/")

    def is_file(self) -> bool:
        return storage.exists(self.uri)

    def names(self, prefix: str = "", after: str = "") -> list[str]:
        """Names of what lies here, in order; none where nothing does. Only those that begin so, and come after that one."""
        return storage.names(self.uri, prefix, after)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that lies right here, by name; none where nothing does."""
        return storage.sizes(self.uri)

    def read_bytes(self) -> bytes:
        """All of a file. Raises FileNotFoundError."""
        return storage.read(self.uri)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write(self, data: bytes) -> None:
        """Write a file: readers see the old content or the new, never half of it."""
        storage.write(self.uri, data)

    def create(self, data: bytes) -> bool:
        """Write a file unless there is one; whether it was written."""
        return storage.create(self.uri, data)

    def remove(self) -> None:
        """Take the file, or the folder and all in it, away; nothing happens where there is none."""
        storage.remove(self.uri)
