"""`mllm chat`: a conversation with a model in the terminal, without Ray.

A line is a question. `/image FILE` shows a picture with the next one, `/again` begins anew, `/quit` or the end of input ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import TextIO

from cluster.local import quieten
from cluster.serving.find import found
from cluster.site import Site
from mllm.generate import Sampling
from mllm.speaker import BadTurns, Speaker, Turn

HELP = "/image FILE shows a picture with the next question, /again begins anew, /quit ends"


class Talk:
    """A conversation that goes on; answers are written to `out` as they come."""

    def __init__(self, speaker: Speaker, how: Sampling, out: TextIO, system: str | None = None) -> None:
        self.speaker = speaker
        self.how = how
        self.out = out
        self.opening = (Turn(role="system", parts=(system,)),) if system else ()
        self.turns: tuple[Turn, ...] = self.opening
        self.shown: tuple[bytes, ...] = ()

    def show(self, file: str) -> None:
        """Show the picture in `file` with the next question. Raises OSError."""
        self.shown = (*self.shown, Path(file).read_bytes())

    def ask(self, question: str) -> None:
        """Ask, and write the answer. Raises BadTurns, after which the conversation is what it was, without its last pictures."""
        asked = (*self.turns, Turn(role="user", parts=(*self.shown, question)))
        self.shown = ()
        prompt = self.speaker.prompt(asked, self.how)
        answer = ""
        for pieces in self.speaker.write([prompt]):
            for _, piece in pieces:
                answer += piece.text
                print(piece.text, end="", flush=True, file=self.out)
        print(file=self.out)
        self.turns = (*asked, Turn(role="assistant", parts=(answer,))) if answer else self.turns

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line until they end."""
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            try:
                match word:
                    case "":
                        continue
                    case "/quit":
                        return
                    case "/again":
                        self.turns, self.shown = self.opening, ()
                    case "/image":
                        self.show(rest.strip())
                    case "/help":
                        print(HELP, file=self.out)
                    case _:
                        self.ask(line.strip())
            except (BadTurns, OSError) as error:
                print(f"cannot: {error}", file=sys.stderr)


def lines() -> Iterable[str]:
    """Lines of a person at a terminal, who is shown a mark, or of standard input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 -- importing it gives `input` its editing keys

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def chat(
    site: Site, checkpoint: str, how: Sampling, question: str | None, images: Sequence[str], system: str | None
) -> None:
    """Talk to the model of `checkpoint`: one question, or as many as standard input has. Raises RunError, BadTurns, OSError."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an export is whole: nothing is asked of a hub
    with found(site, checkpoint) as export:
        quieten(Path(gettempdir()) / "mllm" / export.name / "chat")
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        speaker = Speaker.open(export.folder, device, site.serve.limits)
    talk = Talk(speaker, how, sys.stdout, system)
    for file in images:
        talk.show(file)
    if question is not None:
        talk.ask(question)
        return
    if sys.stdin.isatty():
        print(f"{export.name}: {HELP}")
    talk.run(lines())
