"""Pages of one's own become a corpus that `Interleaved` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.convert import convert, split_sentences
from pipelines.corpora import Interleaved
from pipelines.types import Document, Image, Text
from tests.pipelines.shards import captioned, rows_of, write_pictures

PAGE = """<!DOCTYPE html>
<html><head><title>no text of the page</title><style>p { color: red }</style></head>
<body>
<nav>Home <img src="images/2.jpg"></nav><header>Site</header>
<div role="navigation"><div>Next</div> chapter</div>
<h1>Hats<a class="headerlink" href="#hats">&para;</a></h1>
<p>A hat is worn, e.g. on the head.  It has a brim &amp; a crown. Dr. Hatter says so.
<p>Here <img src="images/0.jpg" alt="a hat"> is one, <b>in</b>line.<br>And then?</p>
<img src="images/1.jpg?size=2"/>
<ul><li>one<li>two</ul>
<pre>def hat():
    return 1. Or 2.
</pre>
<script>var x = "<p>not text</p>";</script>
<img src="https://example.org/far.jpg"><img src="images/gone.jpg"><img src="images/no%20picture.jpg"><img alt="no source">
<footer>Copyright.</footer>
</body></html>
"""

MARKDOWN = """---
title: front matter
---
# Shoes

A shoe ![a shoe][left] is worn. So are
two.

- laces
- soles ![](<images/1.jpg>)

```python
x = "![no](images/0.jpg)"
```

| size | fits |
| --- | --- |
| 9 | me |

[left]: images/0.jpg "title"
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of two pages, with three real pictures."""
    folder = tmp_path / "manual"
    write_pictures(folder / "images", 3)
    (folder / "images" / "no picture.jpg").write_text("this is no picture")
    (folder / "a.html").write_text(PAGE)
    (folder / "b.md").write_text(MARKDOWN)
    (folder / "images" / "notes.txt").write_text("no page")
    return folder


def lines(out: Path, shard: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"docs_shard_{shard}_v3.jsonl").read_text().splitlines()]


def test_a_page_is_its_sentences_and_its_pictures(site: Path, tmp_path: Path) -> None:
    found = convert([str(site / "a.html")], str(tmp_path / "out"))
    (page,) = lines(tmp_path / "out")
    assert page["text_list"] == [
        "Hats",
        "A hat is worn, e.g. on the head.",
        "It has a brim & a crown.",
        "Dr. Hatter says so.",
        "Here is one, inline.",
        "And then?",
        "one",
        "two",
        "def hat():\n    return 1. Or 2.",
    ]
    assert [(info["matched_text_index"], info["alt"]) for info in page["image_info"]] == [(4, "a hat"), (6, "")]
    assert [row.index(1.0) for row in page["similarity_matrix"]] == [4, 6]
    assert page["similarity"] == "position"
    assert (found.pages, found.images, found.sentences, found.shards) == (1, 2, 9, 1)
    assert (found.remote, found.missing, found.unreadable, found.empty) == (1, 1, 1, 0)


def test_markdown_is_read_like_the_page_it_becomes(site: Path, tmp_path: Path) -> None:
    convert([str(site / "b.md")], str(tmp_path / "out"))
    (page,) = lines(tmp_path / "out")
    code = 'x = "![no](images/0.jpg)"'
    assert page["text_list"] == [
        "Shoes",
        "A shoe is worn.",
        "So are two.",
        "laces",
        "soles",
        code,
        "size",
        "fits",
        "9",
        "me",
    ]
    assert [(info["raw_url"], info["matched_text_index"]) for info in page["image_info"]] == [
        ("images/0.jpg", 1),
        ("images/1.jpg", 4),
    ]


def test_what_is_written_is_read_as_pages_in_their_own_order(site: Path, tmp_path: Path) -> None:
    convert(str(site), str(tmp_path / "out"))
    first, second = rows_of(Interleaved(name="own"), tmp_path / "out" / "docs_shard_0_v3.jsonl")
    pictures = [data for data, _ in captioned()[:3]]
    for row in (first, second):
        assert isinstance(row, Document)
        assert [pictures.index(s.data) for s in row.segments if isinstance(s, Image)] == [0, 1]
    assert isinstance(first, Document)
    after = first.segments[first.segments.index(Image(data=pictures[0])) + 1]
    assert isinstance(after, Text)
    assert after.text.startswith("\nHere is one, inline. And then?")


def test_the_same_pages_give_the_same_bytes_in_shards(site: Path, tmp_path: Path) -> None:
    for number in range(3, 8):
        (site / f"{number}.md").write_text(f"Page {number}.\n\n![](images/{number % 3}.jpg)")
    found = convert(str(site), str(tmp_path / "one"), rows_per_shard=3)
    convert(
        [str(page) for page in sorted(site.iterdir(), reverse=True) if page.suffix],
        str(tmp_path / "two"),
        rows_per_shard=3,
    )
    assert (found.shards, found.pages) == (3, 7)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (
        sum(len(rows_of(Interleaved(name="own"), tmp_path / "one" / f"docs_shard_{n}_v3.jsonl")) for n in range(3)) == 7
    )


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("<p>Broken <b>markup <img src='images/0.jpg' <p>goes on", 1),
        ("<p>up <img src='../manual/images/0.jpg'>", 1),
        (
            "<p>odd <img src='images/%00.jpg'><img src='"
            + "n" * 999
            + ".jpg'><img src='//host/a.jpg'><img src='data:,x'>",
            0,
        ),
        ("<nav>never closed, <p>and so all of it is dropped", None),
        ("", None),
        ("<p>an object \ufffc of the page's own <img src='images/0.jpg'>", 1),
        ("<p>caf\xe9 in the wrong encoding", 0),
    ],
)
def test_pages_as_the_web_has_them(site: Path, tmp_path: Path, text: str, url: int | None) -> None:
    (site / "odd.html").write_bytes(text.encode("latin-1" if "wrong" in text else "utf-8"))
    found = convert([str(site / "odd.html")], str(tmp_path / "out"))
    assert (found.pages, found.images) == ((0, 0) if url is None else (1, url))


def test_what_is_no_page_is_refused(site: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a page ending in"):
        convert([str(site / "images" / "0.jpg")], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no page to convert"):
        convert(str(site / "images"), str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError):
        convert([str(site / "gone.html")], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="rows_per_shard is 0"):
        convert(str(site), str(tmp_path / "out"), rows_per_shard=0)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("See Fig. 3 and J. Smith, i.e. the author.", ["See Fig. 3 and J. Smith, i.e. the author."]),
        ("Version 2.0 is out. it runs", ["Version 2.0 is out. it runs"]),
        ("1. First step. Next.", ["1. First step.", "Next."]),
        ("一つ。二つ！", ["一つ。", "二つ！"]),
        ("  \n ", []),
    ],
)
def test_where_sentences_end(text: str, sentences: list[str]) -> None:
    assert list(split_sentences(text)) == sentences
