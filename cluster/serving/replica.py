"""One process with a model that answers OpenAI's chat API over HTTP; Ray Serve makes as many as are asked for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cluster.serving import wire
from cluster.serving.wire import Answering, ChatRequest, Refused, Usage
from mllm.batcher import Batcher, Busy
from mllm.speaker import BadTurns, Piece, Prompt, Speaker, TooLong

if TYPE_CHECKING:
    from cluster.site import Serving

log = logging.getLogger("ray.serve")


class Replica:
    """Answers for the model of `folder`, under the name `name`."""

    def __init__(self, folder: str, name: str, serving: Serving) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = name
        self.serving = serving
        self.created = int(time.time())
        self.speaker = Speaker.open(Path(folder), device, serving.limits)
        self.batcher = Batcher(self.speaker, serving.together, serving.waiting)
        # Pictures are decoded one by one: a hundred hostile ones at a time would be a hundred times as much memory.
        self.readers = ThreadPoolExecutor(1, "mllm-reader")

    async def __call__(self, request: Request) -> Response:
        """Every request comes here; whatever goes wrong is told in OpenAI's form."""
        try:
            return await self._answer(request)
        except Refused as refused:
            return JSONResponse(refused.body(), refused.status)
        except Exception:
            log.exception("a request failed")
            refused = Refused("the server failed at this request; its log says why", status=500)
            return JSONResponse(refused.body(), refused.status)

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path.rstrip("/"), request.method
        known = {
            "/v1/models": "GET",
            f"/v1/models/{self.name}": "GET",
            "/v1/chat/completions": "POST",
            "/health": "GET",
        }
        if path not in known:
            if path.startswith("/v1/models/"):
                raise self._unknown(path.removeprefix("/v1/models/"))
            raise Refused(f"nothing is at {path or '/'}; there are {', '.join(known)}", status=404, code="not_found")
        if method != known[path]:
            raise Refused(f"{path} answers {known[path]}, not {method}", status=405, code="method_not_allowed")
        match path:
            case "/health":
                return Response(status_code=200)
            case "/v1/models":
                return JSONResponse(wire.models(self.name, self.created))
            case "/v1/chat/completions":
                return await self._chat(request)
            case _:
                return JSONResponse(wire.model(self.name, self.created))

    def _unknown(self, name: str) -> Refused:
        return Refused(
            f"no model {name[:100]!r} is served here; there is {self.name!r}",
            status=404,
            code="model_not_found",
            param="model",
        )

    async def _chat(self, request: Request) -> Response:
        asked = wire.read(await self._body(request))
        if asked.model != self.name:
            raise self._unknown(asked.model)
        prompt = await asyncio.get_running_loop().run_in_executor(self.readers, self._prompt, asked)
        pieces = self._pieces(prompt)
        answering, usage = Answering.of(self.name), len(prompt.sample.input_ids)
        if asked.stream:
            counted = asked.stream_options is not None and asked.stream_options.include_usage
            # The first piece is waited for: until then an error can still be told by its status.
            first = await anext(pieces)
            stream = self._events(answering, first, pieces, usage if counted else None)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        text = ""
        last = None
        async for last in pieces:
            text += last.text
        assert last is not None  # an answer has an end
        assert last.finish is not None
        return JSONResponse(answering.whole(text, last.finish, Usage(prompt=usage, completion=last.tokens)))

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than it may be long. Raises Refused."""
        most = self.serving.request_bytes
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise Refused(
                    f"the request has more than {most:,} bytes; send smaller pictures, or fewer",
                    status=413,
                    code="request_too_large",
                )
        return bytes(body)

    def _prompt(self, asked: ChatRequest) -> Prompt:
        try:
            return self.speaker.prompt(asked.turns, asked.sampling)
        except TooLong as error:
            raise Refused(str(error), code="context_length_exceeded", param="messages") from error
        except BadTurns as error:
            raise Refused(str(error), code="invalid_messages", param="messages") from error

    async def _pieces(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """The answer as it comes. Who stops asking -- a client that hangs up -- stops it. Raises Refused."""
        loop = asyncio.get_running_loop()
        come: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        try:
            self.batcher.ask(prompt, lambda piece: _tell(loop, come, piece))
        except Busy as error:
            raise Refused(str(error), status=429, code="overloaded", kind="rate_limit_error") from error
        try:
            while True:
                piece = await come.get()
                if isinstance(piece, Exception):
                    log.error("an answer failed", exc_info=piece)
                    raise Refused("the model failed at this answer; the server's log says why", status=500)
                yield piece
                if piece.finish is not None:
                    return
        finally:
            prompt.gone = True

    async def _events(
        self, answering: Answering, first: Piece, rest: AsyncGenerator[Piece, None], prompt: int | None
    ) -> AsyncIterator[bytes]:
        yield wire.event(answering.chunk({"role": "assistant", "content": ""}))
        piece = first
        try:
            while True:
                if piece.text:
                    yield wire.event(answering.chunk({"content": piece.text}))
                if piece.finish is not None:
                    break
                piece = await anext(rest)
        except Refused as refused:  # too late for a status
            yield wire.event(refused.body())
            return
        finally:
            await rest.aclose()
        yield wire.event(answering.chunk({}, piece.finish))
        if prompt is not None:
            yield wire.event(answering.last(Usage(prompt=prompt, completion=piece.tokens)))
        yield wire.DONE

    def check_health(self) -> None:
        """Asked by Ray Serve now and then: a replica whose writing thread is gone is replaced. Raises RuntimeError."""
        if not self.batcher.thread.is_alive():
            raise RuntimeError("the thread that writes answers has ended")


def _tell(loop: asyncio.AbstractEventLoop, come: asyncio.Queue[Any], piece: Piece | Exception) -> None:
    """Hand `piece` to the loop that waits for it; a loop that is closed waits for nothing."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(come.put_nowait, piece)
