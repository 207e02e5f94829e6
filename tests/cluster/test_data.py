"""`mllm data`: any corpus, by name or address, checked, counted, shown and made; read as a person would read it."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.figures import Histogram
from cluster.mixture import measure
from cluster.naming import KINDS, find_corpus, guess_kind
from cluster.rows import draw
from cluster.site import Site, SiteError
from pipelines.manifest import Manifest, Shard
from pipelines.types import Budget
from pipelines.windows import Stream
from tests.conftest import CORPUS, ROOT
from tests.pipelines.shards import CLIP, every_format, write_lines, write_pictures, write_tar
from tests.s3 import BUCKET, Server

PAIRS = f"{CORPUS}/pairs/{{00000..00004}}.tar"


class Page(HTMLParser):
    """A page's words, its pictures, the elements by class, and the charts' tables; every element is closed."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.words = ""
        self.images: list[str] = []
        self.classes: list[str] = []
        self.scripts = ""
        self.inside: list[str] = []
        self.feed(file.read_text())
        assert not self.inside

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.classes += (given.get("class") or "").split()
        if tag == "img":
            self.images.append(given["src"] or "")
        elif tag != "meta":
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.inside:
            self.scripts += data
        elif "style" not in self.inside:
            self.words += data

    def tables(self) -> dict[str, dict[str, list[float]]]:
        line = next(line for line in self.scripts.splitlines() if line.startswith("const tables = "))
        return json.loads(line.removeprefix("const tables = ").removesuffix(";"))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A site with the example corpora, in a folder of the test's own."""
    site = tmp_path / "site.toml"
    text = (ROOT / "examples" / "site.toml").read_text()
    text = text.replace('"corpus/', f'"{CORPUS}/').replace('"tokenizer"', f'"{ROOT}/examples/tokenizer"')
    site.write_text(text.replace('"../.cache/mllm"', f'"{tmp_path}/cache"'))
    return site


def run(words: list[str], site: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    try:
        main(["data", *words, "--site", str(site)])
        ended = 0
    except SystemExit as end:
        ended = end.code
    told = capsys.readouterr()
    assert ended == code, told.err
    return told.err if code == 2 else told.out


# --- which corpus -----------------------------------------------------------------------------------------------------


def test_the_kind_of_every_format_is_told_by_its_first_row(tmp_path: Path) -> None:
    for corpus, uri in every_format(tmp_path):
        guess = guess_kind(str(uri))
        assert corpus.kind in guess.kinds, (corpus, uri, guess)
        if corpus.name == "base64":
            assert guess.options == {"archive": None}
        if len(guess.kinds) > 1:
            assert uri.suffix in (".csv", ".tsv", ".tar")  # no line of columns, or a caption beside the class


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "vila_smoke"], "'vila_smoke' is a recipe"),
        (["check", str(CORPUS / "pairs")], f"is a folder; name its shards: '{CORPUS}/pairs/*.tar' (5)"),
        (["check", "nowhere/{0..3}.tar"], "nowhere/0.tar; check the address"),
        (["check", PAIRS, "--kind", "pear"], f"did you mean 'pairs'?; kinds are {', '.join(KINDS)}"),
        (["check", PAIRS, "-s", "max_images=4"], "kind 'pairs' has no 'max_images'; it has no options"),
        (["check", "example-pages", "-s", "max_image=4"], "has no 'max_image', did you mean 'max_images'?"),
        (["check", "example-pages", "-s", "max_images=few"], "max_images: Input should be a valid integer"),
        (["check", "example-pages", "-s", "max_images"], "write key=value"),
        (["check", "example-pairs", "--sample", "0"], "at least one row is read"),
        (["stats", "vila_smoke", "--sample", "0"], "at least one row is read"),
        (["stats", "example-pairs", "--tokenizer", "example-bpee"], "did you mean 'example-bpe'?"),
        (["preview", "example-pairs", "--stage", "align"], "'example-pairs' is no recipe's name"),
        (["convert", str(CORPUS / "pairs"), "--out", "out"], "neither a page"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: list[str], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = run(words, here, capsys, code=2)
    assert told in error
    assert error.count("\n") == 1


def test_a_row_that_fits_no_kind_or_several_is_left_to_the_person(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = write_lines(tmp_path / "strange.jsonl", [{"colour": "red"}])
    told = run(["check", str(strange)], here, capsys, code=2)
    assert "first row holds the fields colour, which no kind fits at once; say --kind, one of pairs," in told
    both = write_tar(tmp_path / "both.tar", [("a.jpg", b"x"), ("a.txt", b"x"), ("a.cls", b"1")])
    assert "which pairs, labelled and questions fit; say --kind" in run(["check", str(both)], here, capsys, code=2)
    assert "1 bad" in run(["check", str(both), "--kind", "labelled"], here, capsys, code=1)


def test_options_change_what_is_read_and_the_index_is_kept_apart(here: Path) -> None:
    site = replace(Site(), cache=str(here.parent / "cache"))
    table = here.parent / "table.csv"
    named = write_pictures(here.parent, 3)
    table.write_text("Filename,Caption\n" + "".join(f"{name},{caption}\n" for name, caption in named))
    corpus, located = find_corpus(str(table), site)
    assert (corpus.kind, corpus.name, getattr(corpus, "columns", ())) == (
        "caption_list",
        "table",
        ("filename", "caption"),
    )
    assert located.manifest(corpus).rows == 3
    other, elsewhere = find_corpus(str(table), site, "caption_list", ['columns=["path","text"]'])
    assert elsewhere.cache != located.cache
    assert elsewhere.manifest(other).rows == 4  # the first line spells other columns, and so is a row


def test_a_sample_is_of_random_chunks_and_never_of_a_row_twice() -> None:
    shards = tuple(Shard(uri=f"{i}.tar", rows=100 + i, index="", stamp="", bytes=10**6) for i in range(50))
    manifest = Manifest(corpus="many", shards=shards)
    corpus = find_corpus(PAIRS, Site())[0]
    drawn = draw(corpus, manifest, 500)
    rows = [(chunk.shard, row) for chunk in drawn.chunks for row in range(chunk.start, chunk.stop)]
    assert 400 < len(rows) < 600
    assert len(set(rows)) == len(rows) == drawn.rows
    assert len({shard for shard, _ in rows}) > 8
    assert sum(chunk.stop - chunk.start for chunk in draw(corpus, manifest).chunks) == manifest.rows
    heavy = replace(manifest, shards=tuple(replace(shard, bytes=10**10) for shard in shards))
    assert max(chunk.stop - chunk.start for chunk in draw(corpus, heavy).chunks) == 1


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_decodes_videos_and_obeys_the_sites_limits(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole.mp4").write_bytes(CLIP.read_bytes())
    (tmp_path / "half.mp4").write_bytes(CLIP.read_bytes()[: CLIP.stat().st_size // 2])
    clips = write_lines(tmp_path / "clips.jsonl", [{"video": f"{n}.mp4", "text": n} for n in ("whole", "half", "gone")])
    told = run(["check", str(clips)], here, capsys, code=1)
    assert "clips: 1 good row with 8 images in 1 shard, 2 bad (66.67%); read were all 3 rows" in told
    assert "clips/clips.jsonl row 2: image is missing (gone.mp4)" in told
    here.write_text(here.read_text() + "\n[limits]\npixels = 100_000\n")
    told = run(["check", str(clips)], here, capsys, code=1)
    assert "row 0: image has too many pixels (1280 x 720; a picture may have 100000 pixels)" in told


def test_check_of_a_sample_names_a_shard_at_which_a_run_would_stop(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "fine"} if i % 3 else {"txt": "not"} for i in range(3000)]
    shard = write_lines(tmp_path / "notes.jsonl", rows)
    told = run(["check", str(shard), "--kind", "text", "--sample", "320"], here, capsys, code=1)
    assert "a random sample of 3" in told
    assert "of 3,000 rows" in told
    assert "a field is missing" in told
    assert "a run would stop here: a source's max_bad is 10%" in told


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_a_corpus_on_s3_by_its_address(
    s3: Server, tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        s3.upload(CORPUS / "pairs" / f"0000{number}.tar", f"seen/{number}.tar")
    keys = s3.storage
    here.write_text(
        here.read_text()
        + f'\n[storage]\nendpoint = "{keys.endpoint}"\nregion = "us-east-1"\nkey = "{keys.key}"\nsecret = "{keys.secret}"\n'
    )
    address = f"s3://{BUCKET}/seen/{{0..1}}.tar"
    told = run(["check", address], here, capsys)
    assert "seen: 184 good rows with 184 images in 2 shards, 0 bad" in told
    out = tmp_path / "out.html"
    assert "seen (pairs): 184 rows in 2 shards" in run(["stats", address, "--out", str(out)], here, capsys)
    run(["preview", f"s3://{BUCKET}/seen/*.tar", "--rows", "4", "--out", str(out)], here, capsys)
    assert len(Page(out).images) == 4
    folder = run(["check", f"s3://{BUCKET}/seen/"], here, capsys, code=2)
    assert f"name its shards: 's3://{BUCKET}/seen/*.tar' (2)" in folder
    assert "no file" in run(["check", f"s3://{BUCKET}/seen/{{2..3}}.tar"], here, capsys, code=2)
    write_lines(tmp_path / "page.jsonl", [])
    (tmp_path / "page.md").write_text("# One\n\nA page about nothing.\n")
    told = run(["convert", str(tmp_path / "page.md"), "--out", f"s3://{BUCKET}/made"], here, capsys)
    assert f"mllm data preview 's3://{BUCKET}/made/docs_shard_{{0..0}}_v3.jsonl'" in told
    assert "made: 1 good row" in run(["check", f"s3://{BUCKET}/made/*.jsonl"], here, capsys)


# --- stats ------------------------------------------------------------------------------------------------------------


def test_stats_of_conversations_in_tokens(tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stats.html"
    words = ["stats", "example-instructions", "--tokenizer", "vila_smoke", "--out", str(out)]
    told = run(words, here, capsys)
    rows = json.loads((CORPUS / "instruct" / "llava_instruct.json").read_text())
    turns = sum(len(row["conversations"]) for row in rows)
    assert f"example-instructions (conversations): {len(rows)} rows in 1 shard" in told
    assert f"turns: user {turns // 2:,}, assistant {turns // 2:,}" in told
    assert max(len(line) for line in told.splitlines()[2:-1]) <= 80
    page = Page(out)
    assert "tokens a row" in page.words
    assert "JPEG" in page.words
    lengths = page.tables()["s0f0"]
    assert sum(lengths["count"]) == len(rows)


def test_stats_name_duplicates_bad_rows_and_their_sample(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"number {i}"} for i in range(4000)]
    shard = write_lines(tmp_path / "notes.jsonl", [*rows[:3990], *rows[:9], {"nothing": 1}])
    out = tmp_path / "stats.html"
    told = run(["stats", str(shard), "--sample", "9999", "--out", str(out)], here, capsys)
    assert "notes (text): 4,000 rows in 1 shard" in told
    assert "duplicates in the sample: 9 rows, 0 picture files" in told
    assert "bad rows: 1 of 4,000" in told
    assert "row 3999" in Page(out).words
    assert "a random sample of" in run(["stats", str(shard), "--out", str(out)], here, capsys)


def test_a_histogram_holds_every_value() -> None:
    for values in ([1, 1, 2, 5], [0.5], [3, 3], [1, 2, 3, 4000], [10 * i + 7 for i in range(500)], [0, 10**6]):
        assert sum(Histogram.of("", "", values).counts) == len(values)


def test_stats_of_a_recipe_tell_what_becomes_of_its_mixture(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats.html"
    told = run(["stats", "vila_smoke", "--sample", "128", "--out", str(out)], here, capsys)
    for stage in ("align", "pretrain", "sft"):
        assert f"{stage}: mixture of" in told
    assert "samples a pack, expected fill" in told
    assert "tokens are the scarce budget" in told
    page = Page(out)
    assert page.words.count("tokens/epoch") == 3
    assert set(page.tables()) == {f"s{i}f{j}" for i in range(3) for j in range(2)}


def test_shares_are_of_what_the_packs_hold(stream: Stream) -> None:
    from pipelines.windows import PackWindows

    mixed = measure("pretrain", stream, stream.order.window_rows)
    packs = list(PackWindows(stream).packs(0))
    tokens = [sum(len(pack.input_ids) for pack in packs)]
    for source in range(2):
        lengths = [
            int(stop - start)
            for pack in packs
            for place, (start, stop) in enumerate(zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False))
            if pack.sources[place] == source
        ]
        assert mixed.sources[source].tokens == pytest.approx(sum(lengths) / tokens[0])
    assert mixed.packs == len(packs)
    assert mixed.fill_tokens == pytest.approx(tokens[0] / len(packs) / stream.budget.tokens)
    assert mixed.fill_tiles == pytest.approx(sum(len(p.tiles) for p in packs) / len(packs) / stream.budget.tiles)


def test_a_tile_budget_that_is_badly_chosen_is_named(stream: Stream) -> None:
    narrow = measure("s", replace(stream, budget=Budget(tokens=2048, tiles=6)), 24)
    assert narrow.scarce == "tiles"
    assert "tiles are scarce" in narrow.hints[0]
    assert "with max_tiles=" in narrow.hints[0]
    wide = measure("s", replace(stream, budget=Budget(tokens=256, tiles=500)), 24)
    assert wide.scarce == "tokens"
    assert "500 takes" in wide.hints[0]
    none = measure("s", replace(stream, budget=Budget(tokens=30, tiles=6)), 24)
    assert "rows hold what no pack of 30 tokens" in none.hints[0]


# --- preview ----------------------------------------------------------------------------------------------------------


def test_rows_of_every_format_are_shown(tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "preview.html"
    kinds = set()
    for corpus, uri in every_format(tmp_path / "corpora"):
        if corpus.kind in kinds:
            continue
        kinds.add(corpus.kind)
        changes = [
            f"{name}={json.dumps(value)}"
            for name in ("columns", "classes", "images", "videos", "folder", "archive")
            if (value := getattr(corpus, name, None))
        ]
        words = ["preview", str(uri), "--kind", corpus.kind, "--rows", "6", "--out", str(out)]
        run([*words, *(["-s", *changes] if changes else [])], here, capsys)
        page = Page(out)
        assert page.words.count(" row ") >= 2, corpus
        assert bool(page.images) == (corpus.kind != "text"), corpus
        assert all(image.startswith("data:image/jpeg;base64,") for image in page.images)
        assert ("box" in page.classes) == (corpus.kind == "regions")
        assert ("strip" in page.classes) == (corpus.kind == "videos")
        assert ("preferred" in page.classes) == ("rejected" in page.classes) == (corpus.kind == "preferences")
    assert kinds == set(KINDS)


def test_what_is_learned_is_marked_and_bad_rows_say_why(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk(*said: str) -> dict[str, object]:
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
        return {"conversations": turns}

    rows = [talk("Ask <b>this</b>", "Told so"), {"image": "gone.jpg", **talk("<image>\nWhat?", "A hat")}]
    shard = write_lines(tmp_path / "talk.jsonl", rows)
    out = tmp_path / "preview.html"
    run(["preview", str(shard), "--out", str(out)], here, capsys)
    text = out.read_text()
    assert "<mark>Told so</mark>" in text
    assert "<span>Ask &lt;b&gt;this&lt;/b&gt;</span>" in text
    page = Page(out)
    assert "1 of these 2 rows cannot be used" in page.words
    assert "image is missing (gone.jpg)" in " ".join(page.words.split())


# --- convert ----------------------------------------------------------------------------------------------------------


def test_converted_pages_are_read_again(tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = tmp_path / "manual"
    name, _ = write_pictures(pages, 1)[0]
    (pages / "one.md").write_text(
        f"# A title\n\nBefore it. ![a picture]({name}) After it.\n\n![far](https://x.org/a.png)\n"
    )
    (pages / "two.html").write_text("<p>Another page.</p><img src='gone.png'>")
    told = run(["convert", str(pages), "--out", str(tmp_path / "corpus"), "--rows-per-shard", "1"], here, capsys)
    assert f"{tmp_path}/corpus: 2 pages in 2 shards, " in told
    assert "1 pictures placed" in told
    assert "left out: 1 remote pictures" in told
    assert "left out: 1 pictures that are not there" in told
    address = told.split("mllm data preview '")[1].split("'")[0]
    assert "corpus: 2 good rows with 1 images in 2 shards, 0 bad" in run(["check", address], here, capsys)


def test_a_name_that_the_site_alone_knows_is_guessed(here: Path) -> None:
    site = Site(corpora={"mine": PAIRS}, cache=str(here.parent / "cache"))
    corpus, located = find_corpus("mine", site)
    assert (corpus.kind, corpus.name) == ("pairs", "mine")
    assert located.manifest(corpus).rows == 460
    with pytest.raises(SiteError, match="did you mean 'mine'"):
        find_corpus("mime", site)
