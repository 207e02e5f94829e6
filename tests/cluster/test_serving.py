"""A model served by Ray Serve on this machine, asked as any program asks OpenAI's API; and the same in the terminal."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from cluster.cli import main
from cluster.serving.find import Found
from cluster.serving.serve import served
from cluster.site import Serving, load_site
from mllm.batcher import Batcher, Busy
from mllm.export import export
from mllm.generate import Sampling
from mllm.recipe import Recipe
from mllm.speaker import Piece, Speaker, Turn
from tests.conftest import ROOT
from tests.mllm.test_generate import bomb

TOKENIZER = str(ROOT / "examples" / "tokenizer")
NAME = "toy"
BYTES = 300_000


@pytest.fixture(scope="module")
def folder(small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = small.model.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.1)
    return export(small, model, TOKENIZER, tmp_path_factory.mktemp("run") / "export")


@pytest.fixture(scope="module")
def server(folder: Path, ray_cluster: None) -> Iterator[httpx.Client]:  # noqa: ARG001 -- it must be there
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serving = Serving(port=port, request_bytes=BYTES, waiting=400)
    with (
        served(Found(folder=folder, name=NAME), serving) as address,
        httpx.Client(base_url=address, timeout=120) as client,
    ):
        yield client


def picture(colour: str, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def shown(data: bytes, mime: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}}


def said(*content: Any, **more: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    message = {"role": "user", "content": parts[0]["text"] if parts[0].get("text") and len(parts) == 1 else parts}
    return {"model": NAME, "messages": [message], "temperature": 0, "max_tokens": 8, **more}


def answer(server: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    reply = server.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error in OpenAI's form."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_models_are_listed(server: httpx.Client) -> None:
    listed = server.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == [NAME]
    assert server.get(f"/v1/models/{NAME}").json()["object"] == "model"
    assert refusal(server.get("/v1/models/gpt-4o"), 404)["code"] == "model_not_found"
    assert refusal(server.get("/v1/embeddings"), 404)["message"].startswith("nothing is at /v1/embeddings")
    assert refusal(server.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"


def test_an_answer_is_the_models_own(server: httpx.Client, folder: Path) -> None:
    told = answer(server, said(shown(picture("red")), "What is it?"))
    ours = Speaker.open(folder).answer(
        [Turn(role="user", parts=(picture("red"), "What is it?"))], Sampling(max_tokens=8)
    )
    choice = told["choices"][0]
    assert told["object"] == "chat.completion"
    assert told["model"] == NAME
    assert choice["message"] == {"role": "assistant", "content": ours}
    assert choice["finish_reason"] in ("stop", "length")
    usage = told["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 <= usage["completion_tokens"] <= 8


def test_a_stream_says_the_same(server: httpx.Client) -> None:
    body = said("Count to three.", max_tokens=12)
    whole = answer(server, body)["choices"][0]
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with server.stream("POST", "/v1/chat/completions", json=streamed) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    *chunks, last = [json.loads(line) for line in lines[:-1]]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] >= 1
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == whole["message"]["content"]
    assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == [whole["finish_reason"]]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_seed_and_stop_are_heard(server: httpx.Client) -> None:
    drawn = [
        answer(server, said("Hm?", temperature=1.5, seed=seed, top_p=0.9))["choices"][0]["message"]["content"]
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = answer(server, said("Hm?", max_tokens=16))["choices"][0]["message"]["content"]
    stop = whole[3:5]
    cut = answer(server, said("Hm?", max_tokens=16, stop=[stop]))["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"model": "gpt-4o"}, "model", "no model 'gpt-4o'"),
        ({"messages": []}, "messages", "no messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "end with theirs"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"tools": []}, "tools", "does not know it"),
        ({"n": 2}, "n", "should be 1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": "8"}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**6}, "messages", "lower max_tokens"),
        ({"stop": ""}, "stop", "an empty text"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"seed": 2**70}, "seed", "less than"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_by_name(
    change: dict[str, Any], param: str, told: str, server: httpx.Client
) -> None:
    error = refusal(
        server.post("/v1/chat/completions", json={**said("Hm?"), **change}), 404 if param == "model" else 400
    )
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)
    assert told in error["message"]


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}, "not fetched from anywhere"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "not fetched from anywhere"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}, "no picture in base64"),
        ({"type": "image_url", "image_url": {"url": "data:text/html;base64,AAAA"}}, "no picture in base64"),
        (shown(b"\x89PNG\r\n\x1a\n and no more"), "image"),
        (shown(picture("red", (300, 300), "JPEG")[:700], "image/jpeg"), "truncated"),
        (shown(bomb(6000)), "too many pixels"),
        (shown(b"GIF89a" + b"\xff" * 64, "image/gif"), "image"),
        ({"type": "input_audio", "input_audio": {}}, "expected tags"),
    ],
    ids=["http", "file", "base64", "html", "cut", "truncated", "bomb", "gif", "audio"],
)
def test_a_picture_that_cannot_be_used_is_refused(part: dict[str, Any], told: str, server: httpx.Client) -> None:
    assert told in refusal(server.post("/v1/chat/completions", json=said(part, "Hm?")), 400)["message"]
    assert answer(server, said("Hm?"))["choices"]  # and the server goes on


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"model": "toy"', b"[" * 100_000, b'"x"'])
def test_a_body_that_is_no_request_is_refused(body: bytes, server: httpx.Client) -> None:
    assert refusal(server.post("/v1/chat/completions", content=body), 400)["message"]


def test_a_request_that_is_too_long_is_read_no_further(server: httpx.Client) -> None:
    """Told by its length or not: a client that streams for ever is cut off."""
    large = json.dumps(said("x" * BYTES)).encode()
    assert refusal(server.post("/v1/chat/completions", content=large), 413)["code"] == "request_too_large"

    def drops() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (BYTES // 10)

    assert refusal(server.post("/v1/chat/completions", content=drops()), 413)["code"] == "request_too_large"


def test_hundreds_may_ask_at_once(server: httpx.Client) -> None:
    asked = [
        said("Hm?", max_tokens=4) if n % 4 else said(shown(picture("blue")), "Hm?", max_tokens=4) for n in range(200)
    ]
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=server.base_url, timeout=120, limits=limits) as client, ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(lambda body: client.post("/v1/chat/completions", json=body), asked))
    assert [reply.status_code for reply in replies] == [200] * 200
    alone = [answer(server, body)["choices"][0]["message"] for body in asked[:2]]
    for number, reply in enumerate(replies):
        assert reply.json()["choices"][0]["message"] == alone[1 if number % 4 else 0]


def test_the_line_has_an_end(folder: Path) -> None:
    """Beyond it one is told to come again; nobody who waits is forgotten, and who hangs up costs nothing."""
    speaker = Speaker.open(folder)
    batcher = Batcher(speaker, most=2, waiting=3)
    writing, go_on, ended = threading.Event(), threading.Event(), threading.Semaphore(0)

    def tell(piece: Piece | Exception) -> None:
        writing.set()
        go_on.wait(30)
        if isinstance(piece, Piece) and piece.finish:
            ended.release()

    prompts = [speaker.prompt([Turn(role="user", parts=("Hm?",))], Sampling(max_tokens=3)) for _ in range(6)]
    batcher.ask(prompts[1], tell)
    assert writing.wait(30)  # and now it holds still
    for prompt in prompts[2:5]:
        batcher.ask(prompt, tell)
    with pytest.raises(Busy, match="3 conversations wait already"):
        batcher.ask(prompts[5], tell)
    go_on.set()
    assert all(ended.acquire(timeout=30) for _ in range(4))
    gone = replace(prompts[0], gone=True)
    batcher.ask(gone, tell)
    batcher.close()
    assert not ended.acquire(blocking=False)


def test_one_talks_in_the_terminal(folder: Path, tmp_path: Path) -> None:
    """As a person would: a process of its own, lines on its standard input."""
    (tmp_path / "red.png").write_bytes(picture("red"))
    words = f"/image {tmp_path}/red.png\nWhat is it?\n/image nowhere.png\n/again\nHm?\n/quit\nnever asked\n"
    command = [str(Path(sys.executable).parent / "mllm"), "chat", str(folder), "--max-tokens", "8"]
    done = subprocess.run(command, input=words, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    speaker = Speaker.open(folder)
    ours = [
        speaker.answer([Turn(role="user", parts=parts)], Sampling(max_tokens=8))
        for parts in ((picture("red"), "What is it?"), ("Hm?",))
    ]
    assert done.stdout == "".join(f"{one}\n" for one in ours)
    assert "cannot: " in done.stderr
    assert "nowhere.png" in done.stderr


@pytest.mark.alone
@pytest.mark.parametrize(("asked", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_where_and_ends_when_it_is_asked_to(folder: Path, asked: signal.Signals, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "mllm"), "serve", str(folder), "--port", str(port)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has background jobs ignore
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            assert said == f"{folder.name} at http://127.0.0.1:{port}/v1 (Ctrl-C ends)\n"
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                answer(
                    client, {"model": folder.name, "messages": [{"role": "user", "content": "Hm?"}], "max_tokens": 2}
                )
            process.send_signal(asked)
            assert (process.wait(60), process.stdout.read()) == (code, "")
        finally:
            process.kill()


def test_mistakes_are_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, told in (
            (["chat", "no-such-run"], "no run 'no-such-run'"),
            (["chat", str(folder), "--say", "Hm?", "--temperature", "-1"], "temperature=-1.0"),
            (["chat", str(folder), "--say", ""], "message 0 is empty"),
            (["serve", str(folder), "--port", port], f"cannot listen at 127.0.0.1:{port}"),
        ):
            with pytest.raises(SystemExit) as end:
                main(words)
            assert end.value.code == 2
            assert told in capsys.readouterr().err


def test_the_site_says_who_may_reach_it(tmp_path: Path) -> None:
    assert load_site().serve.host == "127.0.0.1"
    (tmp_path / "site.toml").write_text('[serve]\nhost = "0.0.0.0"\nport = 9000\n[serve.limits]\npixels = 1000\n')
    serving = load_site(str(tmp_path / "site.toml")).serve
    assert (serving.host, serving.port, serving.limits.pixels) == ("0.0.0.0", 9000, 1000)
    assert serving.limits.pictures == load_site().serve.limits.pictures == 16  # what is not said stays narrow
