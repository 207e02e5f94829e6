"""Answers: what is drawn, where they end, and that a cache changes nothing."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllm.export import export
from mllm.fusion import PreLMAdapter
from mllm.generate import Annotate, Cached, Recomputed, Sampling, choose, decoder_of
from mllm.instructed import QFORMER_TOKENIZER
from mllm.recipe import Recipe
from mllm.recipes import by_name
from mllm.speaker import BadTurns, Pen, Speaker, TooLong, Turn
from mllm.tiny import tiny
from mllm.vlm import VisionLanguageModel
from pipelines.encode import TextCodec
from pipelines.types import NOT_LEARNED, Batch, Pack
from tests.conftest import CORPUS, ROOT

TOKENIZER = str(ROOT / "examples" / "tokenizer")
CODEC = TextCodec(TOKENIZER, None, None)
FILE = (CORPUS / "instruct/images/000000017.jpg").read_bytes()


def picture(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """Some bytes that say they are a picture of side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def asked(*parts: str | bytes) -> list[Turn]:
    return [Turn(role="user", parts=parts)]


def lively(recipe: Recipe, annotate: Annotate | None = None) -> Speaker:
    """A model of weights large enough that different prompts get different answers."""
    torch.manual_seed(0)
    model = recipe.model.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.1)
    return Speaker(recipe, model, TOKENIZER, annotate=annotate)


@pytest.fixture(scope="module")
def speaker(small: Recipe) -> Speaker:
    return lively(small)


def test_a_cache_changes_no_logit(small: Recipe, speaker: Speaker) -> None:
    """Prompts of several lengths, with and without pictures, some of which end before the others."""
    other = lively(small)
    plain = Recomputed(other.model)
    cached = speaker.decoder
    assert isinstance(cached, Cached)
    how = Sampling()
    prompts = [
        speaker.prompt(turns, how) for turns in (asked("Hm?"), asked(FILE, "What is it?"), asked("One, two, three"))
    ]
    told = [p.sample for p in prompts], [p.tiles for p in prompts]
    torch.testing.assert_close(cached.begin(*told), plain.begin(*told), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached.step([5, 6, 7]), plain.step([5, 6, 7]), rtol=1e-4, atol=1e-4)
    for decoder in (cached, plain):
        decoder.keep([0, 2])
    torch.testing.assert_close(cached.step([8, 9]), plain.step([8, 9]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["openflamingo_9b", "cogvlm_17b", "llava_next_7b", "blip2_flan_t5_xl"])
def test_models_of_many_kinds_answer(name: str) -> None:
    speaker = lively(tiny(by_name(name)))
    one, two = (
        speaker.answer(asked(picture(colour), "What is it?"), Sampling(max_tokens=6)) for colour in ("red", "blue")
    )
    assert one or two


def test_a_picture_changes_the_logits(speaker: Speaker) -> None:
    logits = []
    for shown in ((), (picture("black"),), (FILE,)):
        prompt = speaker.prompt(asked(*shown, "What is it?"), Sampling())
        logits.append(speaker.decoder.begin([prompt.sample], [prompt.tiles])[0])
    assert all((a - b).abs().max() > 1e-3 for a, b in ((logits[0], logits[1]), (logits[1], logits[2])))


def test_an_answer_does_not_depend_on_its_company(speaker: Speaker) -> None:
    how = Sampling(max_tokens=12)
    questions = [asked("Hm?"), asked(FILE, "What is it?"), asked("A longer question than the others?")]
    alone = [speaker.answer(turns, how) for turns in questions]
    together = speaker.answers([speaker.prompt(turns, how) for turns in questions])
    assert together == alone
    assert len(set(alone)) > 1


def test_a_seed_repeats_what_chance_did(speaker: Speaker) -> None:
    drawn = [speaker.answer(asked("Hm?"), Sampling(max_tokens=16, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_text_after_a_stop_is_not_given(speaker: Speaker) -> None:
    whole = speaker.answer(asked("Hm?"), Sampling(max_tokens=20))
    stop = whole[5:8]
    assert speaker.answer(asked("Hm?"), Sampling(max_tokens=20, stop=(stop,))) == whole[: whole.index(stop)]


@given(text=st.text(max_size=30), stop=st.text(min_size=1, max_size=3))
def test_pieces_are_the_answer_cut_at_its_stop(text: str, stop: str) -> None:
    """However tokens fall on characters and stops, and though bytes of one character come one by one."""
    ids = CODEC.tokenizer.encode(text, add_special_tokens=False).ids
    pen = Pen(CODEC, Sampling(max_tokens=1000, stop=(stop,)), {-1})
    given_out = ""
    for token in [*ids, -1]:
        piece = pen.add(token)
        given_out += piece.text
        if piece.finish:
            break
    assert given_out == CODEC.decode(ids).partition(stop)[0]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.05, 1), st.integers(0, 99))
def test_a_token_is_drawn_from_the_nucleus(values: list[float], top_p: float, seed: int) -> None:
    logits = torch.tensor(values)
    how = Sampling(temperature=1.0, top_p=top_p, seed=seed)
    token = choose(logits, how, torch.Generator().manual_seed(seed))
    shares = logits.softmax(0)  # in which logits may be alike that are not
    likelier = shares[shares > shares[token]].sum()
    assert likelier < top_p + 1e-6
    assert choose(logits, Sampling(), torch.Generator()) == int(logits.argmax())


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([], "no messages"),
        ([Turn(role="assistant", parts=("Hi",))], "last message is of the assistant"),
        ([Turn(role="user", parts=("Hi",)), Turn(role="system", parts=("Be kind",))], "move it to the front"),
        ([Turn(role="system", parts=(FILE,)), Turn(role="user", parts=("Hi",))], "only the user shows pictures"),
        (asked(""), "message 0 is empty"),
        (asked(b"GIF89a and no more", "Hm?"), "image"),
        (asked(FILE[:2000], "Hm?"), "truncated"),
        (asked(bomb(6000), "Hm?"), "too many pixels"),
        (asked(picture("red", (2000, 4)), "Hm?"), "far longer than wide"),
        (asked(*[picture("red")] * 17, "Hm?"), "17 pictures"),
        (asked("x" * 200_001), "characters"),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_refused(turns: list[Turn], told: str, speaker: Speaker) -> None:
    with pytest.raises(BadTurns, match=told):
        speaker.prompt(turns, Sampling())


def test_a_conversation_must_leave_room(speaker: Speaker) -> None:
    with pytest.raises(TooLong, match="lower max_tokens"):
        speaker.prompt(asked("Hm?"), Sampling(max_tokens=speaker.context))


def test_what_writes_no_text_is_told(tmp_path: Path) -> None:
    recipe = tiny(by_name("clip_b32"))
    folder = export(recipe, recipe.model.build(), TOKENIZER, tmp_path / "export")
    with pytest.raises(ValueError, match="writes no text"):
        Speaker.open(folder)


def test_an_exported_model_is_opened(small: Recipe, tmp_path: Path) -> None:
    """As one folder of transformers and in parts: the answer of the model that was exported."""
    for recipe in (small, replace(small, model=replace(small.model, fusion=PreLMAdapter(hidden=8)))):
        ours = lively(recipe)
        folder = export(recipe, ours.model, TOKENIZER, tmp_path / "export")
        question = asked(FILE, "What is it?")
        assert Speaker.open(folder).answer(question, Sampling(max_tokens=8)) == ours.answer(
            question, Sampling(max_tokens=8)
        )


def test_a_connector_reads_what_is_asked(tmp_path: Path) -> None:
    """InstructBLIP: the question before the first answer, as in training; each prompt its own, whatever comes after."""
    recipe = tiny(by_name("instructblip_7b"))
    assert recipe.instructions is not None
    write = recipe.instructions.packs(lambda _: TOKENIZER)
    model = lively(recipe, write).model
    assert isinstance(model, VisionLanguageModel)
    folder = export(recipe, model, TOKENIZER, tmp_path / "export", TOKENIZER)
    speaker = Speaker.open(folder)
    first = Turn(role="user", parts=(FILE, "What is it?"))
    talk = [[first], [first, Turn(role="assistant", parts=("A dog.",)), Turn(role="user", parts=("And here?",))]]
    prompts = [speaker.prompt(turns, Sampling(max_tokens=8)) for turns in talk]
    read, again = (write(Pack.of_samples([prompt.sample], prompt.tiles)).instructions for prompt in prompts)
    assert read is not None
    assert again is not None
    assert np.array_equal(read, again)
    assert "What is it?" in CODEC.decode([token for token in read[0].tolist() if token != NOT_LEARNED])

    other = speaker.prompt(asked(FILE, "Name the colour of the sky."), Sampling(max_tokens=8))
    pack = Pack.of_samples([prompts[0].sample], prompts[0].tiles)
    told, misled = (
        write(pack),
        replace(pack, instructions=write(Pack.of_samples([other.sample], other.tiles)).instructions),
    )
    logits = [model.next_logits(Batch.of(one))[0] for one in (told, misled)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3  # so that it shows whose question was read
    for decoder in (Cached(model, write), Recomputed(model, write)):
        assert torch.allclose(decoder.begin([prompts[0].sample], [prompts[0].tiles])[0], logits[0], atol=1e-4)
    together = speaker.answers([*prompts, other])
    assert together == [speaker.answers([one])[0] for one in [*prompts, other]]
    assert together == list(lively(recipe, write).answers([*prompts, other]))

    shutil.rmtree(folder / QFORMER_TOKENIZER)
    with pytest.raises(ValueError, match="export it again, so that the Q-Former's tokenizer lies in the folder"):
        Speaker.open(folder)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"stop": ("",)}])
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]  # each is of its field's type


def test_the_decoder_is_the_quickest_that_is_right(small: Recipe) -> None:
    assert isinstance(decoder_of(small.model.build()), Cached)
    beside = replace(small.model, fusion=PreLMAdapter(hidden=8))
    assert isinstance(decoder_of(beside.build()), Recomputed)
