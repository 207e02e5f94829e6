"""How a document is written down for a language model: which characters, and which of them carry loss.

A template is a frozen value. Segments without a role (web pages, captions) are written as they are; turns of a conversation
get the template's marks, and only what the assistant says -- and the mark that ends it -- is learned. To add one: a spec with
`before`, `after`, `system` and `jinja`, and its name in `Template`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipelines.types import Codes, Measured, Picture, Role, Text, spec

CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
"""A turn's text in Jinja, images first-class as `{"type": "image"}`."""


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
        """The same template for `tokenizer.apply_chat_template`."""
        system = f"<|im_start|>system\n{self.system}<|im_end|>\n" if self.system else ""
        return (
            f"{{{{ {system!r} }}}}"
            "{% for message in messages %}"
            "{{ '<|im_start|>' + message['role'] + '\n' }}" + CONTENT + "{{ '<|im_end|>\n' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )


@spec
class Vicuna:
    """`USER: ... ASSISTANT: ...</s>` after one system sentence (Vicuna v1.1, LLaVA-1.5, VILA).

    The space after `ASSISTANT:` is the answer's: tokenizers of Llama's kind make one token of it and the answer's first word,
    which is learned, and which a prompt must not begin for the model.
    """

    kind: Literal["vicuna"] = "vicuna"
    system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def before(self, role: Role) -> tuple[Span, ...]:
        if role == "assistant":
            return (Span(text="ASSISTANT:", learn=False), Span(text=" ", learn=True))
        return (Span(text="USER: ", learn=False),) if role == "user" else ()

    def after(self, role: Role) -> tuple[Span, ...]:
        if role == "assistant":
            return (Span(text="</s>", learn=True, special=True),)
        return (Span(text=" ", learn=False),)

    def jinja(self) -> str:
        """The same template for `tokenizer.apply_chat_template`."""
        return (
            f"{{{{ {self.system + ' '!r} }}}}"
            "{% for message in messages %}"
            "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] }}" + CONTENT + ""
            "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
        )


@spec
class Llama3:
    """`<|start_header_id|>role<|end_header_id|>\\n\\n ... <|eot_id|>` (Llama 3's model card)."""

    kind: Literal["llama3"] = "llama3"
    system: str = ""

    def before(self, role: Role) -> tuple[Span, ...]:
        return (
            Span(text="<|start_header_id|>", learn=False, special=True),
            Span(text=role, learn=False),
            Span(text="<|end_header_id|>", learn=False, special=True),
            Span(text="\n\n", learn=False),
        )

    def after(self, role: Role) -> tuple[Span, ...]:
        return (Span(text="<|eot_id|>", learn=role == "assistant", special=True),)

    def jinja(self) -> str:
        """The same template for `tokenizer.apply_chat_template`."""
        opening = "<|start_header_id|>{}<|end_header_id|>\n\n"
        system = f"{opening.format('system')}{self.system}<|eot_id|>" if self.system else ""
        return (
            f"{{{{ {system!r} }}}}"
            "{% for message in messages %}"
            "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}" + CONTENT + "{{ '<|eot_id|>' }}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {opening.format('assistant')!r} }}}}{{% endif %}}"
        )


@spec
class Mistral:
    """`[INST] ... [/INST] ...</s>` (Mistral-7B-Instruct, LLaVA-NeXT's `mistral_instruct`).

    It has no turn for a system, whose words stand at the head of the first question. The space before an answer is the
    answer's, as with Vicuna.
    """

    system: ClassVar[str] = ""
    kind: Literal["mistral"] = "mistral"

    def before(self, role: Role) -> tuple[Span, ...]:
        return (Span(text=" ", learn=True),) if role == "assistant" else (Span(text="[INST] ", learn=False),)

    def after(self, role: Role) -> tuple[Span, ...]:
        if role == "assistant":
            return (Span(text="</s>", learn=True, special=True),)
        return (Span(text=" [/INST]", learn=False),)

    def jinja(self) -> str:
        """The same template for `tokenizer.apply_chat_template`."""
        return (
            "{% for message in messages %}"
            "{% if message['role'] == 'assistant' %}{{ ' ' }}"
            "{% elif loop.first or loop.previtem['role'] != 'system' %}{{ '[INST] ' }}{% endif %}" + CONTENT + ""
            "{{ {'system': '\n\n', 'user': ' [/INST]', 'assistant': '</s>'}[message['role']] }}"
            "{% endfor %}"
        )


@spec
class Plain:
    """What is said and nothing else, an answer after a space; `end` closes it (BLIP-2's language models, Flan-T5).

    A space, for a tokenizer of T5's kind begins every text with one, and the answer is a text of its own for the decoder.
    """

    system: ClassVar[str] = ""
    kind: Literal["plain"] = "plain"
    end: str = "</s>"

    def before(self, role: Role) -> tuple[Span, ...]:
        return (Span(text=" ", learn=True),) if role == "assistant" else ()

    def after(self, role: Role) -> tuple[Span, ...]:
        return (Span(text=self.end, learn=True, special=True),) if role == "assistant" else ()

    def jinja(self) -> str:
        """The same template for `tokenizer.apply_chat_template`."""
        begin = "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
        end = f"{{% if message['role'] == 'assistant' %}}{{{{ {self.end!r} }}}}{{% endif %}}"
        return "{% for message in messages %}" + begin + CONTENT + end + "{% endfor %}"


Template = Annotated[ChatML | Vicuna | Llama3 | Mistral | Plain, Field(discriminator="kind")]


def render(document: Measured, template: Template, prompt: bool = False) -> list[Span | Picture | Codes]:
    """`document` as spans and images in reading order; with `prompt`, open for the assistant to answer."""
    spans: list[Span | Picture | Codes] = []
    said = document.segments
    conversation = any(segment.role is not None for segment in said)
    if conversation and template.system and said[0].role != "system":
        spans += [*template.before("system"), Span(text=template.system, learn=False), *template.after("system")]
    if isinstance(template, Mistral):
        said = tuple(map(_asked, said))
    role: Role | None
    for role, segments in groupby(said, key=_role):
        body = [Span(text=s.text, learn=s.learn) if isinstance(s, Text) else s for s in segments]
        spans += body if role is None else [*template.before(role), *body, *template.after(role)]
    if prompt and conversation:  # what is learned of a turn's beginning, the model writes
        spans += [span for span in template.before("assistant") if not span.learn]
    return spans


def _role(segment: Text | Picture | Codes) -> Role | None:
    return segment.role


def _asked(segment: Text | Picture | Codes) -> Text | Picture | Codes:
    """A system's words as the head of the question that follows them."""
    if not isinstance(segment, Text) or segment.role != "system":
        return segment
    return replace(segment, text=f"{segment.text}\n\n", role="user")
