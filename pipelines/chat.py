"""How a document is written down for a language model: which characters, and which of them carry loss.

A template is a frozen value. Segments without a role (web pages, captions) are written as they are; turns of a conversation
get the template's marks, and only what the assistant says -- and the mark that ends it -- is learned.
"""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Literal

from pydantic import Field

from pipelines.types import Codes, Measured, Picture, Role, Text, spec


@spec
class Span:
    """Characters with one fate. A `special` span is a token of the vocabulary by name; any other is plain text, in which
    nothing can spell a special token."""

    text: str
    learn: bool
    special: bool = False


@spec
class ChatML:
    """`<|im_start|>role\\n ... <|im_end|>\\n` (Qwen, SmolLM2)."""

    kind: Literal["chatml"] = "chatml"
    system: str = ""

    def before(self, role: Role) -> tuple[Span, ...]:
        return (Span(text="<|im_start|>", learn=False, special=True), Span(text=f"{role}\n", learn=False))

    def after(self, role: Role) -> tuple[Span, ...]:
        learn = role == "assistant"
        return (Span(text="<|im_end|>", learn=learn, special=True), Span(text="\n", learn=False))

    def jinja(self) -> str:
        """The same template for `tokenizer.apply_chat_template`, images first-class as `{"type": "image"}`."""
        system = f"<|im_start|>system\n{self.system}<|im_end|>\n" if self.system else ""
        return (
            f"{{{{ {system!r} }}}}"
            "{% for message in messages %}"
            "{{ '<|im_start|>' + message['role'] + '\n' }}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endif %}"
            "{{ '<|im_end|>\n' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )


@spec
class Vicuna:
    """`USER: ... ASSISTANT: ...</s>` after one system sentence (Vicuna v1.1, LLaVA-1.5, VILA)."""

    kind: Literal["vicuna"] = "vicuna"
    system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def before(self, role: Role) -> tuple[Span, ...]:
        mark = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}[role]
        return (Span(text=mark, learn=False),) if mark else ()

    def after(self, role: Role) -> tuple[Span, ...]:
        if role == "assistant":
            return (Span(text="</s>", learn=True, special=True),)
        return (Span(text=" ", learn=False),)

    def jinja(self) -> str:
        """The same template for `tokenizer.apply_chat_template`, images first-class as `{"type": "image"}`."""
        return (
            f"{{{{ {self.system + ' '!r} }}}}"
            "{% for message in messages %}"
            "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] }}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endif %}"
            "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
        )


Template = Annotated[ChatML | Vicuna, Field(discriminator="kind")]


def render(document: Measured, template: ChatML | Vicuna, prompt: bool = False) -> list[Span | Picture | Codes]:
    """`document` as spans and images in reading order; with `prompt`, open for the assistant to answer."""
    spans: list[Span | Picture | Codes] = []
    conversation = any(segment.role is not None for segment in document.segments)
    if conversation and template.system and document.segments[0].role != "system":
        spans += [*template.before("system"), Span(text=template.system, learn=False), *template.after("system")]
    role: Role | None
    for role, segments in groupby(document.segments, key=_role):
        body = [Span(text=s.text, learn=s.learn) if isinstance(s, Text) else s for s in segments]
        spans += body if role is None else [*template.before(role), *body, *template.after(role)]
    if prompt and conversation:
        spans += template.before("assistant")
    return spans


def _role(segment: Text | Picture | Codes) -> Role | None:
    return segment.role
