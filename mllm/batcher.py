"""Answers for many who ask at once: prompts wait in a line, and are written some at a time by one thread.

Those that are taken together stay together until each has ended; what comes meanwhile waits. Enough to try a model out, and to
hold when hundreds ask at the same moment; a server for a product lets prompts join at every token.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from mllm.speaker import Piece, Prompt, Speaker

Tell = Callable[[Piece | Exception], None]
"""Called from the writing thread: with each piece of an answer, or with what went wrong, after which nothing comes."""


class Busy(RuntimeError):
    """More wait already than may."""


class Batcher:
    """Writes up to `most` answers at a time while up to `waiting` wait. A daemon's thread does it; `close` ends it."""

    def __init__(self, speaker: Speaker, most: int = 16, waiting: int = 256) -> None:
        self.speaker = speaker
        self.most = most
        self.line: queue.Queue[tuple[Prompt, Tell] | None] = queue.Queue(waiting)
        self.thread = threading.Thread(target=self._work, name="mllm-batcher", daemon=True)
        self.thread.start()

    def ask(self, prompt: Prompt, tell: Tell) -> None:
        """Have `prompt` answered. Set `prompt.gone` when nobody waits any more. Raises Busy."""
        try:
            self.line.put_nowait((prompt, tell))
        except queue.Full:
            raise Busy(
                f"{self.line.maxsize} conversations wait already; ask again later, or serve more replicas"
            ) from None

    def close(self) -> None:
        """End once those that are being written have ended."""
        self.line.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (first := self.line.get()) is not None:
            together = [first]
            ends = False
            with suppress(queue.Empty):
                while len(together) < self.most and not ends:
                    one = self.line.get_nowait()
                    ends = one is None
                    together += [one] if one is not None else []
            self._write([(prompt, tell) for prompt, tell in together if not prompt.gone])
            if ends:
                return

    def _write(self, asked: list[tuple[Prompt, Tell]]) -> None:
        if not asked:
            return
        try:
            for pieces in self.speaker.write([prompt for prompt, _ in asked]):
                for number, piece in pieces:
                    asked[number][1](piece)
        except Exception as error:  # whatever it is, those who wait must hear of it, and the next must be answered
            for _, tell in asked:
                tell(error)
