"""What the model sees of a document, and what it learns from it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipelines.chat import ChatML, Span, Vicuna, render
from pipelines.encode import Encoder, TextCodec
from pipelines.types import (
    IMAGE_TOKEN,
    NOT_LEARNED,
    Budget,
    Reason,
    Role,
    RowId,
    SkipSample,
    Text,
    Tiled,
    Tiles,
    VisionLayout,
)
from tests.conftest import CORPUS, ROOT

TOKENIZER = str(ROOT / "examples" / "tokenizer")
LAYOUT = VisionLayout(shape=(3, 4, 4), tokens_per_tile=5)
ROW = RowId(corpus="c", shard="s", epoch=0, row=0)


def picture(tiles: int = 1, shade: int = 0) -> Tiles:
    return Tiles(pixels=torch.full((tiles, 3, 4, 4), shade, dtype=torch.uint8), grid=(1, tiles), original=(4, 4))


def encoder(tokens: int = 64, tiles: int = 4) -> Encoder:
    codec = TextCodec(TOKENIZER, "<|endoftext|>", "<|im_end|>")
    return Encoder(codec, ChatML(), LAYOUT, Budget(tokens=tokens, tiles=tiles))


def document(*segments: Text | Tiles) -> Tiled:
    return Tiled(id=ROW, source=0, segments=segments)


def learned(e: Encoder, sample) -> str:
    return e.codec.tokenizer.decode(sample.labels[sample.labels != NOT_LEARNED].tolist(), skip_special_tokens=False)


def test_a_caption_is_learned_and_its_picture_takes_what_the_layout_says() -> None:
    e = encoder()
    (sample,) = e.encode(document(picture(2), Text(text="\na red shirt")))
    assert (sample.input_ids == IMAGE_TOKEN).sum() == LAYOUT.tokens(2) == 10
    assert learned(e, sample) == "\na red shirt<|im_end|>"
    assert sample.input_ids[0] == e.codec.special("<|endoftext|>")
    following = np.append(sample.input_ids[1:], -1)
    at = sample.labels != NOT_LEARNED
    assert (sample.labels[at] == following[at]).all()


def test_only_answers_are_learned_in_a_real_conversation() -> None:
    item = json.loads((CORPUS / "instruct/llava_instruct.json").read_text())[0]
    turns = [
        Text(
            text=t["value"].replace("<image>", ""),
            role="user" if t["from"] == "human" else "assistant",
            learn=t["from"] == "gpt",
        )
        for t in item["conversations"]
    ]
    e = encoder(256)
    (sample,) = e.encode(document(*turns))
    assert learned(e, sample) == "".join(t.text + "<|im_end|>" for t in turns if t.role == "assistant")


@pytest.mark.parametrize("template", [ChatML(), ChatML(system="Be brief."), Vicuna()])
def test_the_exported_chat_template_writes_the_same_conversation(template) -> None:
    talk: list[tuple[Role, str]] = [
        ("user", "What is\n this? "),
        ("assistant", " A <b>hat</b>."),
        ("user", "Why?"),
        ("assistant", "It is."),
    ]
    spans = render(document(*(Text(text=t, role=r) for r, t in talk)), template)
    ours = "".join(span.text for span in spans if isinstance(span, Span))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    messages = [{"role": role, "content": text} for role, text in talk]
    assert tokenizer.apply_chat_template(messages, chat_template=template.jinja(), tokenize=False) == ours
    if isinstance(template, ChatML):
        e = Encoder(TextCodec(TOKENIZER, None, "<|im_end|>"), template, LAYOUT, Budget(tokens=256, tiles=1))
        (sample,) = e.encode(document(*(Text(text=t, role=r) for r, t in talk)))
        theirs = tokenizer.apply_chat_template(messages, chat_template=template.jinja(), return_dict=False)
        assert sample.input_ids.tolist() == theirs


def test_text_cannot_spell_a_special_token() -> None:
    e = encoder()
    (sample,) = e.encode(document(Text(text="say <|im_end|> or <image>")))
    inside = sample.input_ids[1:-1]
    assert e.codec.special("<|im_end|>") not in inside
    assert IMAGE_TOKEN not in inside


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 2), st.text("ab cd\n", min_size=1, max_size=120)), min_size=1, max_size=12))
def test_long_documents_are_split_and_images_never_cut(parts: list[int | str]) -> None:
    e = encoder(tokens=24, tiles=3)
    segments = [picture(p) if isinstance(p, int) else Text(text=p) for p in parts]
    if not any(isinstance(p, str) and p.strip() for p in parts):
        with pytest.raises(SkipSample, match=Reason.EMPTY):
            e.encode(document(*segments))
        return
    samples = e.encode(document(*segments))
    for sample in samples:
        assert len(sample.input_ids) <= 24
        assert len(sample.tiles) <= 3
        visual = sample.input_ids == IMAGE_TOKEN
        assert visual.sum() == LAYOUT.tokens(len(sample.tiles))
        runs = np.flatnonzero(np.diff(np.concatenate([[0], visual, [0]])))
        assert ((runs[1::2] - runs[::2]) % LAYOUT.tokens_per_tile == 0).all()
    whole = encoder(tokens=10_000, tiles=1000).encode(document(*segments))[0]
    text = whole.input_ids[whole.input_ids != IMAGE_TOKEN]
    pieces = [t for s in samples for t in s.input_ids[s.input_ids != IMAGE_TOKEN].tolist()]
    assert len(pieces) >= len(text) - 24  # only a piece without a learned token may be missing
    assert len({sample.id.piece for sample in samples}) == len(samples)


def test_an_image_that_no_pack_can_hold_is_dropped_with_both_numbers() -> None:
    with pytest.raises(SkipSample, match="15 tokens and 3 tiles; a pack holds 12 and 4") as skip:
        encoder(tokens=12).encode(document(picture(3), Text(text="x")))
    assert skip.value.reason is Reason.IMAGE_TOO_LONG


def test_an_empty_document_and_one_that_teaches_nothing_are_dropped() -> None:
    with pytest.raises(SkipSample, match=Reason.EMPTY):
        encoder().encode(document(picture(), Text(text=" \n")))
    with pytest.raises(SkipSample, match=Reason.NOTHING_TO_LEARN):
        encoder().encode(document(Text(text="hello", role="user", learn=False)))


def test_a_template_of_another_tokenizer_is_refused() -> None:
    e = Encoder(TextCodec(TOKENIZER, None, "</s>"), Vicuna(), LAYOUT, Budget(tokens=64, tiles=1))
    with pytest.raises(ValueError, match="has no token '</s>'"):
        e.encode(document(Text(text="hello")))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        _ = TextCodec("/nowhere", None, None).tokenizer
