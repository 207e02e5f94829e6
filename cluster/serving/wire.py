"""OpenAI's chat completions as they travel: https://platform.openai.com/docs/api-reference/chat.

Only what is understood is taken: a field that is unknown, or that asks for what is not there (tools, several answers, penalties),
is refused by name, since an answer that silently ignores it would mislead. Pictures come within the request, as `data:`
addresses; an address on the web is refused, for a server that fetches whatever it is told can be made to read what only it can
reach.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
import uuid
from dataclasses import field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from mllm.generate import Sampling
from mllm.speaker import Turn
from pipelines.types import spec

MOST_STOPS = 4


class Refused(Exception):
    """A request that is not answered: OpenAI's error, with its HTTP status."""

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None, kind: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """OpenAI's error."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@spec
class TextPart:
    """Words of a message."""

    type: Literal["text"]
    text: str


@spec
class ImageUrl:
    """Where a picture is. `detail` is taken and not looked at: the model's tiling says how pictures are cut."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


@spec
class ImagePart:
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


@spec
class Message:
    """What one side says. `name` is taken and not looked at."""

    role: Literal["system", "user", "assistant"]
    content: str | tuple[Part, ...]
    name: str | None = None


@spec
class StreamOptions:
    """Whether the last part of a stream tells how many tokens there were."""

    include_usage: bool = False


@spec
class ChatRequest:
    """The body of a request. Fields of OpenAI's that stand here with one value only can be given, and change nothing."""

    model: str
    messages: tuple[Message, ...]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    stop: str | Annotated[tuple[str, ...], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    logprobs: Literal[False] | None = False
    user: str | None = None
    metadata: dict[str, str] | None = field(default=None)
    store: bool | None = None

    @property
    def sampling(self) -> Sampling:
        """How the answer is written; what was left away or is null is OpenAI's default, but for the length."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if "" in stop:
            raise Refused("stop: an empty text would end every answer before it begins", param="stop")
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=stop,
            seed=self.seed,
        )

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What is said, pictures as their files' bytes. Raises Refused."""
        return tuple(
            Turn(role=message.role, parts=tuple(_part(part, f"messages.{number}") for part in _parts(message)))
            for number, message in enumerate(self.messages)
        )


def _parts(message: Message) -> tuple[str | TextPart | ImagePart, ...]:
    return (message.content,) if isinstance(message.content, str) else message.content


def _part(part: str | TextPart | ImagePart, where: str) -> str | bytes:
    match part:
        case TextPart():
            return part.text
        case ImagePart():
            return picture_of(part.image_url.url, where)
        case _:
            return part


DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


def picture_of(url: str, where: str) -> bytes:
    """The bytes of a picture that lies in its address, `data:image/png;base64,...`. Raises Refused."""
    scheme = url.partition(":")[0].lower()
    if scheme != "data":
        raise Refused(
            f"{where}: image_url begins {scheme[:20]!r}, and pictures are not fetched from anywhere; send the file itself, as "
            "data:image/png;base64,...",
            code="invalid_image_url",
            param=where,
        )
    head = DATA.match(url)
    try:
        if head is None:
            raise binascii.Error("expected data:image/png;base64, and then the file")
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(
            f"{where}: image_url is no picture in base64: {error}", code="invalid_image_url", param=where
        ) from error


@cache
def _requests() -> TypeAdapter[ChatRequest]:
    return TypeAdapter(ChatRequest)


def read(body: bytes) -> ChatRequest:
    """A request's body. Raises Refused, naming the field that cannot be used."""
    try:
        return _requests().validate_json(body, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        if faults[0]["type"] == "json_invalid":
            raise Refused(f"the body is no JSON: {faults[0]['msg']}", code="invalid_json") from error
        # Where a field may be one of several things, the fault that lies deepest is of the one that was meant.
        fault = max(enumerate(faults), key=lambda one: (len(one[1]["loc"]), one[0]))[1]
        steps = [str(step) for step in fault["loc"]]
        path = ".".join(step for step in steps if step != "str" and "[" not in step) or None
        unknown = fault["type"] == "unexpected_keyword_argument"
        told = "this server does not know it" if unknown else str(fault["msg"])
        raise Refused(
            f"{path or 'the request'}: {told}", code="unknown_parameter" if unknown else "invalid_value", param=path
        ) from error


@spec
class Usage:
    """Tokens of the prompt, visual ones counted, and of the answer."""

    prompt: int
    completion: int

    def body(self) -> dict[str, int]:
        """The three numbers by OpenAI's names."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


Finish = Literal["stop", "length"]


@spec
class Answering:
    """What all parts of one answer have in common."""

    id: str
    model: str
    created: int

    @classmethod
    def of(cls, model: str) -> Answering:
        """An answer that begins now."""
        return cls(id=f"chatcmpl-{uuid.uuid4().hex}", model=model, created=int(time.time()))

    def whole(self, text: str, finish: Finish, usage: Usage) -> dict[str, Any]:
        """The answer in one."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage.body()}

    def chunk(self, delta: dict[str, str], finish: Finish | None = None) -> dict[str, Any]:
        """A part of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def last(self, usage: Usage) -> dict[str, Any]:
        """The part that tells the usage, where it was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage.body()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def models(name: str, created: int) -> dict[str, Any]:
    """The list of models: one."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    """One model, by the moment at which its server began."""
    return {"id": name, "object": "model", "created": created, "owned_by": "mllm"}


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
