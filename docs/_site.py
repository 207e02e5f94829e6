"""What the documentation site does to pages: files of the repository that are no pages are named, not linked."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")
"""A link to a file above `docs/`, which the repository's own pages may have and a site has not."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""

    def named(found: re.Match[str]) -> str:
        words, path = found.groups()
        return words if path in words else f"{words} (`{path}`)"

    return OUTSIDE.sub(named, markdown)
