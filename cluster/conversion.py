"""`mllm data convert`: pages of one's own brought to MMC4's layout, and how to read what came of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from pipelines import storage
from pipelines.convert import HTML_SUFFIXES, MARKDOWN_SUFFIXES, convert
from pipelines.manifest import expand
from pipelines.rows import suffix

PAGES = (*HTML_SUFFIXES, *MARKDOWN_SUFFIXES)


def convert_pages(words: Sequence[str], out: str, rows_per_shard: int, console: Console) -> None:
    """Convert pages, folders of pages and patterns of either to folder `out`, and say what came of it.

    Raises ValueError when there is no page among them, FileNotFoundError when one is not there.
    """
    out = out.rstrip("/") if "://" in out else str(Path(out).expanduser().absolute())
    pages = [page for word in words for page in _pages(word)]
    if not pages:
        raise ValueError(f"no page in {', '.join(words)}; expected .{', .'.join(PAGES)}, or a folder that holds some")
    done = convert(pages, out, rows_per_shard)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, emoji=False)

    shards = f"{done.shards:,} shard{'s' if done.shards != 1 else ''}"
    say(f"{out}: {done.pages:,} pages in {shards}, {done.sentences:,} sentences, {done.images:,} pictures placed")
    left = {
        "remote pictures (http and the like: download them first)": done.remote,
        "pictures that are not there": done.missing,
        "pictures that cannot be read": done.unreadable,
        "pages without text": done.empty,
    }
    for what, count in left.items():
        if count:
            say(f"  left out: {count:,} {what}")
    if not done.shards:
        return
    name = Path(out.partition("://")[2] or out).name
    address = f"{out}/docs_shard_{{0..{done.shards - 1}}}_v3.jsonl"
    say(f"look at it:      mllm data preview '{address}'")
    say(f'in a site file:  [corpora]  {name} = "{address}"')
    say(f'in a recipe:     Source(corpus=Interleaved(name="{name}"))')


def _pages(word: str) -> Iterator[str]:
    """Addresses of the pages that a word means: itself, those of a pattern, or those below a folder."""
    word = word if "://" in word else str(Path(word).expanduser().absolute())
    for address in expand(word):
        if suffix(address) in PAGES:
            yield address
            continue
        found = [page for page in storage.glob(f"{address.rstrip('/')}/**") if suffix(page) in PAGES]
        if not found and "*" not in word:
            raise ValueError(f"{address}: neither a page (.{', .'.join(PAGES)}) nor a folder that holds one")
        yield from found
