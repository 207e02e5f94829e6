"""What the model sees of a document, and what it learns from it."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipelines.chat import ChatML, Llama3, Mistral, Plain, Span, Vicuna, render
from pipelines.encode import Encoder, TextCodec
from pipelines.types import (
    IMAGE_TOKEN,
    NOT_LEARNED,
    Branch,
    Budget,
    Cut,
    Image,
    Measured,
    Pack,
    Picture,
    Reason,
    Role,
    RowId,
    SkipSample,
    Text,
    VisionLayout,
)
from tests.conftest import CORPUS, ROOT

TOKENIZER = str(ROOT / "examples" / "tokenizer")
LAYOUT = VisionLayout(shape=(3, 4, 4), tokens_per_tile=5)
ROW = RowId(corpus="c", shard="s", epoch=0, row=0)


def picture(tiles: int = 1) -> Picture:
    return Picture(of=Image(data=b""), cut=cut(tiles))


def cut(tiles: int) -> Cut:
    return Cut(height=4, width=4 * tiles, rows=1, cols=tiles, canvas=(4, 4 * tiles))


def encoder(tokens: int = 64, tiles: int = 4) -> Encoder:
    codec = TextCodec(TOKENIZER, "<|endoftext|>", "<|im_end|>")
    return Encoder(codec, ChatML(), LAYOUT, Budget(tokens=tokens, tiles=tiles))


def document(*segments: Text | Picture) -> Measured:
    return Measured(id=ROW, source=0, segments=segments)


def learned(e: Encoder, sample) -> str:
    return e.codec.tokenizer.decode(sample.labels[sample.labels != NOT_LEARNED].tolist(), skip_special_tokens=False)


def test_a_caption_is_learned_and_its_picture_takes_what_the_layout_says() -> None:
    e = encoder()
    (sample,) = e.encode(document(picture(2), Text(text="\na red shirt")))
    assert (sample.input_ids == IMAGE_TOKEN).sum() == LAYOUT.tokens(cut(2)) == 10
    assert learned(e, sample) == "\na red shirt<|im_end|>"
    assert sample.input_ids[0] == e.codec.special("<|endoftext|>")
    following = np.append(sample.input_ids[1:], -1)
    at = sample.labels != NOT_LEARNED
    assert (sample.labels[at] == following[at]).all()


@given(st.text(max_size=60), st.lists(st.booleans(), min_size=1, max_size=3))
def test_text_is_cut_into_the_same_tokens_whatever_of_it_is_learned(text: str, learn: list[bool]) -> None:
    """Where everything has one fate, tokens are found by a faster way that does not tell where they start."""
    codec = TextCodec(TOKENIZER, None, None)
    ids, _ = codec.encode([Span(text=text, learn=True)])
    third = -(-len(text) // len(learn))
    spans = [Span(text=text[i * third : (i + 1) * third], learn=yes) for i, yes in enumerate(learn)]
    cut, learned = codec.encode(spans)
    assert cut.tolist() == ids.tolist() == codec.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(learned) == len(ids)
    if len(set(learn)) == 1:
        assert (learned == learn[0]).all()


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


@pytest.mark.parametrize(
    "template",
    [ChatML(), ChatML(system="Be brief."), Vicuna(), Llama3(), Llama3(system="Be brief."), Mistral(), Plain()],
)
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
        assert sample.tiles <= 3
        visual = sample.input_ids == IMAGE_TOKEN
        assert visual.sum() == sum(sample.visual) == sum(LAYOUT.tokens(p.cut) for p in sample.pictures)
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


def test_both_answers_of_a_preference_follow_the_same_question_and_picture() -> None:
    e = encoder(128)
    shown, asked = picture(), Text(text="What is it?", role="user", learn=False)
    row = document(replace(shown, role="user"), asked, Text(text="A hat.", role="assistant"))
    (sample,) = e.encode(replace(row, rejected=(Text(text="A green dog.", role="assistant"),)))
    pack = Pack.of_samples([sample], np.zeros((2, 3, 4, 4), np.uint8))
    assert pack.branches.tolist() == [Branch.PREFERRED, Branch.REJECTED]
    assert sample.visual == (5, 5)
    first, second = (slice(a, b) for a, b in pairwise(pack.cu_seqlens))
    said = [pack.labels[part][pack.labels[part] != NOT_LEARNED].tolist() for part in (first, second)]
    assert [e.codec.tokenizer.decode(ids, skip_special_tokens=True) for ids in said] == ["A hat.", "A green dog."]
    question = [np.flatnonzero(pack.labels[part] != NOT_LEARNED)[0] for part in (first, second)]
    assert (pack.input_ids[first][: question[0]] == pack.input_ids[second][: question[1]]).all()


def test_a_preference_longer_than_a_pack_is_dropped_whole() -> None:
    row = document(Text(text="Why?", role="user", learn=False), Text(text="So. " * 40, role="assistant"))
    with pytest.raises(SkipSample) as skip:
        encoder(64).encode(replace(row, rejected=(Text(text="No.", role="assistant"),)))
    assert skip.value.reason is Reason.TOO_LONG


def test_a_picture_with_a_class_needs_no_words() -> None:
    (sample,) = encoder().encode(replace(document(picture()), label=7))
    pack = Pack.of_samples([sample], np.zeros((1, 3, 4, 4), np.uint8))
    assert pack.classes.tolist() == [7]
    assert pack.learned == 0
