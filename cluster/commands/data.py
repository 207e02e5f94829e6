"""Corpora: indexed, checked, measured and looked at before they are trained on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from cluster.commands.words import (
    Change,
    Corpus,
    Flag,
    Kind,
    Name,
    Number,
    Option,
    RunName,
    SiteFile,
    plain_console,
    recipe_of,
    site_of,
)


@dataclass
class Index:
    """Scan a corpus's shards: rows, byte ranges, sizes, checksums. `train` does it by itself where it is missing."""

    corpus: Corpus
    """A corpus's name, as a recipe or the site spells it, or an address, in quotes: 's3://bucket/x/{00000..00009}.tar'"""
    kind: Kind = None
    s: Option = ()
    beside: Flag = False
    """Keep the index in the corpus's own folder, for all who read it."""
    verify: Flag = False
    """Read every shard again and name those whose contents have changed."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.datacheck import index
        from cluster.naming import find_corpus

        corpus, site = find_corpus(self.corpus, site_of(self.site), self.kind, self.s)
        sys.exit(index(corpus, site, plain_console(), self.beside, self.verify))


@dataclass
class Check:
    """Read every row of a corpus, decode its pictures and videos, and name the bad rows; ends with 1 when there are some."""

    corpus: Corpus
    """A corpus's name, as a recipe or the site spells it, or an address, in quotes: 's3://bucket/x/{00000..00009}.tar'"""
    kind: Kind = None
    s: Option = ()
    sample: Number = None
    """Read only about so many rows, in random chunks."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.datacheck import check
        from cluster.naming import find_corpus

        corpus, site = find_corpus(self.corpus, site_of(self.site), self.kind, self.s)
        sys.exit(check(corpus, site, plain_console(), self.sample))


@dataclass
class Stats:
    """Tell what a corpus is made of, or what a recipe's mixtures become when packed; as a table and as a page."""

    corpus: Corpus
    """A corpus's name or address, or a recipe's name (or recipe.json)."""
    kind: Kind = None
    s: Annotated[Change, arg(help="Change an option of the corpus (-s max_images=4), or the recipe.")] = ()
    sample: int = 2000
    """Read about so many rows, at random; of a recipe, so many of each stage."""
    tokenizer: Name = None
    """Measure text in tokens: a recipe's name, a name under [weights] or a tokenizer's folder."""
    out: Path = Path("stats.html")
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.mixture import write_mixture
        from cluster.naming import find_corpus, is_recipe, tokenizer_folder
        from cluster.stats import write_stats

        site = site_of(self.site)
        if self.kind is None and is_recipe(self.corpus):
            write_mixture(recipe_of(self.corpus, self.s), site, plain_console(), self.out, self.sample)
            return
        tokenizer = None if self.tokenizer is None else tokenizer_folder(self.tokenizer, site)
        corpus, site = find_corpus(self.corpus, site, self.kind, self.s)
        write_stats(corpus, site, plain_console(), self.out, self.sample, tokenizer)


@dataclass
class Quarantine:
    """Show the rows that a run dropped, by corpus and reason."""

    run: RunName
    rows: Flag = False
    """Every row by name."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster import quarantine
        from cluster.run import open_run

        folder, _, _ = open_run(site_of(self.site), self.run)
        sys.exit(quarantine.show(folder, plain_console(), self.rows))


@dataclass
class Preview:
    """Write a page that shows rows of a corpus, or a recipe's packs, as a person would read them."""

    corpus: Corpus
    """A corpus's name or address: its rows; or a recipe's name: its packs, tiles and learned tokens."""
    kind: Kind = None
    s: Annotated[Change, arg(help="Change an option of the corpus (-s max_images=4), or the recipe.")] = ()
    rows: int = 20
    """Rows of a corpus, drawn at random."""
    stage: Name = None
    """The stage of a recipe whose packs are shown; the first by default."""
    packs: int = 10
    """Packs of a recipe's stage."""
    out: Path = Path("preview.html")
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.browse import write_rows
        from cluster.naming import find_corpus, is_recipe
        from cluster.preview import write_preview

        if self.kind is not None or not is_recipe(self.corpus):
            if self.stage is not None:
                raise ValueError(f"--stage {self.stage} is one of a recipe, and {self.corpus!r} is no recipe's name")
            corpus, site = find_corpus(self.corpus, site_of(self.site), self.kind, self.s)
            print(write_rows(corpus, site, plain_console(), self.rows, self.out))
            return
        recipe = recipe_of(self.corpus, self.s)
        names = [stage.name for stage in recipe.stages]
        if self.stage is not None and self.stage not in names:
            raise ValueError(f"recipe {recipe.name!r} has no stage {self.stage!r}; its stages are {names}")
        stage = recipe.stage(self.stage) if self.stage else recipe.stages[0]
        print(write_preview(site_of(self.site).stream(recipe, stage), self.packs, self.out))


@dataclass
class Convert:
    """Bring HTML and Markdown pages with local pictures to a corpus of interleaved documents, in MMC4's layout."""

    pages: Positional[tuple[str, ...]]
    """Pages, folders of pages, or patterns."""
    out: str
    """The folder, local or s3://, that the shards go to."""
    rows_per_shard: int = 1000
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.conversion import convert_pages

        site_of(self.site)  # which says how storage is reached
        convert_pages(self.pages, self.out, self.rows_per_shard, plain_console())
