"""The corpus that every loader reads, made once and kept in `benchmarks/.cache`.

What the pictures are: the photos and drawings of `examples/corpus/pairs`, enlarged to 568 x 566 pixels, with grain added (seeded
normal noise, the same in all three channels, another for each row), JPEG quality 90. Enlarged pictures alone are smooth and
decode too cheaply; the grain is chosen so that a file has the 96 KB, and so takes the time, of a web photo of that size. What
the captions are: words of the example text corpora, as many as makes 270 tokens in the mean, log-normal (sigma 0.65) as the
mixture of alt-texts and long descriptions that was measured: batches of eight padded to the longest are about 0.56 full.

`ROWS` different rows lie in tars of 128 (`key.jpg`, `key.txt`, `key.json`); a corpus of more rows is the same shards again by
hard links under other names, so that the page cache holds it and its manifest is as long as a large corpus's. A competitor
that wants its own format gets the same rows in it, shard by shard, and is repeated in the same way.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ROWS = 3072
SHARD_ROWS = 128
HEIGHT, WIDTH = 566, 568
QUALITY = 90
GRAIN = 7.5
"""Standard deviation of the grain, of 255."""

MEAN_TOKENS = 270
SIGMA = 0.65
SHORTEST, LONGEST = 16, 1200


def corpus(cache: Path, rows: int = ROWS) -> Path:
    """The folder with `tar/00000.tar` and so on; made unless it is there already, as it would be made now."""
    folder = cache / f"data-{rows}"
    settings = repr((HEIGHT, WIDTH, QUALITY, GRAIN, MEAN_TOKENS, SIGMA, SHORTEST, LONGEST, SHARD_ROWS))
    made = folder / "made"
    if not made.is_file() or made.read_text() != settings:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tar").mkdir(parents=True)
        write_tars(folder / "tar", rows)
        made.write_text(settings)
    return folder


def shards(folder: Path) -> list[str]:
    """The tars of a corpus, or of a repeated one, in order."""
    return sorted(str(file) for file in folder.glob("*.tar"))


def read(uri: str) -> Iterator[tuple[str, bytes, bytes]]:
    """Key, picture and caption of each row of one tar: the plainest reader there is, which the limit uses too."""
    with tarfile.open(uri) as archive:
        picture = b""
        for member in archive:
            key, _, suffix = member.name.partition(".")
            if suffix == "jpg":
                picture = body(archive, member)
            elif suffix == "txt":
                yield key, picture, body(archive, member)


def body(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member.name
    return file.read()


def repeated(source: Path, target: Path, rows: int) -> Path:
    """`target`: the tars of `source`, again and again by hard links, until there are `rows`."""
    target.mkdir(parents=True, exist_ok=True)
    for number, uri in enumerate(islice(cycle(shards(source)), rows // SHARD_ROWS)):
        link(Path(uri), target / f"{number:05d}.tar")
    return target


def warm(folder: Path) -> None:
    """Read every file once, so that the page cache holds it."""
    for file in {path.stat().st_ino: path for path in folder.rglob("*") if path.is_file()}.values():
        with file.open("rb") as opened:
            while opened.read(2**22):
                pass


def link(source: Path, target: Path) -> None:
    if not target.exists():
        os.link(source, target)


def write_tars(folder: Path, rows: int) -> None:
    pictures, words, per_word = load_examples()
    for shard in range(-(-rows // SHARD_ROWS)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for row in range(SHARD_ROWS):
                seed = shard * SHARD_ROWS + row
                caption = make_caption(words, per_word, seed)
                key = f"{shard:05d}{row:04d}"
                add(archive, f"{key}.jpg", make_picture(pictures[seed % len(pictures)], seed))
                add(archive, f"{key}.txt", caption.encode())
                add(archive, f"{key}.json", json.dumps({"key": key, "caption": caption}).encode())


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def load_examples() -> tuple[list[bytes], list[str], float]:
    """The example corpus's pictures, the words of its texts, and how many tokens a word takes."""
    from tokenizers import Tokenizer

    pictures = []
    for uri in sorted((EXAMPLES / "corpus" / "pairs").glob("*.tar")):
        with tarfile.open(uri) as archive:
            pictures += [body(archive, m) for m in archive if m.name.endswith((".jpg", ".jpeg", ".png"))]
    words: list[str] = []
    for file in sorted((EXAMPLES / "corpus" / "text").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            words += " ".join(value for value in json.loads(line).values() if isinstance(value, str)).split()
    tokenizer = Tokenizer.from_file(str(EXAMPLES / "tokenizer" / "tokenizer.json"))
    return pictures, words, len(tokenizer.encode(" ".join(words)).ids) / len(words)


def make_picture(source: bytes, seed: int) -> bytes:
    import numpy as np
    import simplejpeg

    from ops import images

    enlarged = images.resize(images.decode(source), HEIGHT, WIDTH).permute(1, 2, 0).numpy()
    grain = np.random.default_rng(seed).standard_normal((HEIGHT, WIDTH, 1), np.float32) * np.float32(GRAIN)
    pixels = (enlarged + grain).clip(0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=QUALITY, colorsubsampling="420")


def make_caption(words: list[str], per_word: float, seed: int) -> str:
    rng = random.Random(seed)
    tokens = min(LONGEST, max(SHORTEST, rng.lognormvariate(0, SIGMA) * MEAN_TOKENS / LOG_NORMAL_MEAN))
    start = rng.randrange(len(words) - LONGEST)
    return " ".join(words[start : start + max(1, round(tokens / per_word))])


LOG_NORMAL_MEAN = 2.718281828 ** (SIGMA**2 / 2)
