"""Chat templates: the very characters of each model's own, what of them is learned, and what a prompt leaves to be written."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

from pipelines.chat import ChatML, Llama3, Mistral, Plain, Span, Template, Vicuna, render
from pipelines.encode import Encoder, TextCodec
from pipelines.types import NOT_LEARNED, Budget, Measured, Role, RowId, Text, VisionLayout
from tests.conftest import ROOT

ROW = RowId(corpus="c", shard="s", epoch=0, row=0)
TALK: list[tuple[Role, str]] = [
    ("user", "How many?"),
    ("assistant", "Two of them."),
    ("user", "Sure?"),
    ("assistant", "Yes."),
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

WRITTEN = {
    # What is learned stands between « and ».
    ChatML(): (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n«Two of them.<|im_end|>»\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
    ),
    ChatML(system="Be brief."): (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n«Two of them.<|im_end|>»\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
    ),
    Vicuna(system="Be brief."): (
        "Be brief. USER: How many? ASSISTANT:« Two of them.</s>»USER: Sure? ASSISTANT:« Yes.</s>»"
    ),
    Llama3(): (
        "<|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Two of them.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
    ),
    Mistral(): "[INST] How many? [/INST]« Two of them.</s>»[INST] Sure? [/INST]« Yes.</s>»",
    Plain(): "How many?« Two of them.</s>»Sure?« Yes.</s>»",
}


def document(talk: list[tuple[Role, str]]) -> Measured:
    return Measured(
        id=ROW, source=0, segments=tuple(Text(text=text, role=role, learn=role == "assistant") for role, text in talk)
    )


@pytest.mark.parametrize("template", WRITTEN, ids=lambda template: f"{template.kind}{'+' * bool(template.system)}")
def test_a_conversation_is_written_as_the_model_knows_it(template: Template) -> None:
    told, open_ = "", False
    for span in render(document(TALK), template):
        assert isinstance(span, Span)
        if span.learn != open_:
            told, open_ = told + ("«" if span.learn else "»"), span.learn
        told += span.text
    assert told + "»" * open_ == WRITTEN[template]


def test_what_a_system_says_stands_where_each_template_has_it() -> None:
    talk: list[tuple[Role, str]] = [("system", "Be brief."), *TALK[:2]]
    texts = {
        type(template): "".join(span.text for span in render(document(talk), template) if isinstance(span, Span))
        for template in (Llama3(system="Not this."), Mistral())
    }
    assert texts[Mistral] == "[INST] Be brief.\n\nHow many? [/INST] Two of them.</s>"
    assert texts[Llama3].startswith("<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header")


def words(folder: Path) -> str:
    """A tokenizer of Llama's kind: whole words, each with the space before it."""
    pieces = [
        "Be",
        "brief.",
        "USER:",
        "ASSISTANT:",
        "How",
        "many?",
        "Two",
        "of",
        "them.",
        "Sure?",
        "Yes.",
        "[INST]",
        "[/INST]",
        "user",
        "assistant",
    ]
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", *(f"▁{piece}" for piece in pieces)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def bytes_(folder: Path) -> str:
    """The example's, of GPT-2's kind."""
    tokenizer = Tokenizer.from_file(str(ROOT / "examples" / "tokenizer" / "tokenizer.json"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize(
    ("template", "make"),
    [*((each, bytes_) for each in WRITTEN), *((each, words) for each in (Vicuna(), Mistral(), Plain()))],
    ids=lambda value: getattr(value, "kind", getattr(value, "__name__", "")),
)
def test_a_prompt_ends_where_what_is_learned_begins(template: Template, make, tmp_path: Path) -> None:
    """Down to the token: the answer's first is learned, whatever space it has before it, and no prompt begins it."""
    codec = TextCodec(make(tmp_path), "<s>", "</s>")
    encoder = Encoder(codec, template, VisionLayout(shape=(3, 4, 4), tokens_per_tile=1), Budget(tokens=256, tiles=1))
    (sample,) = encoder.encode(document(TALK[:2]))
    first = int((sample.labels != NOT_LEARNED).argmax())
    prompt = encoder.prompt(document(TALK[:1]))
    assert prompt.input_ids.tolist() == sample.input_ids[: first + 1].tolist()
    learned = sample.labels[sample.labels != NOT_LEARNED].tolist()
    told = codec.tokenizer.decode(learned, skip_special_tokens=True).replace("▁", " ")
    assert " ".join(told.split()) == "Two of them."
    assert codec.tokenizer.id_to_token(learned[-1]) in SPECIAL
