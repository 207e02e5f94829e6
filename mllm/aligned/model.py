"""Models that align pictures and texts before, or while, they fuse them: the spec, and the module behind every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mllm.aligned.begin import begin
from mllm.aligned.bert import ALBEF, BLIP, Aligning
from mllm.aligned.coca import CoCa
from mllm.aligned.qllama import QLLaMAPairs, go_on
from mllm.aligned.querying import QFormerPairs
from mllm.aligned.rows import Embedded, Given, Rows, given
from mllm.aligned.twin import Queue, as_buffers, follow, shed
from mllm.encoders import Encoder, Folder
from mllm.model import Model, ModelSpec, Words, check_tiles
from mllm.pairs import Pairs
from ops.images import normalize
from pipelines.tiling import Tiling
from pipelines.types import Batch, VisionLayout, spec

T = TypeVar("T")

Arch = Annotated[ALBEF | BLIP | CoCa | QFormerPairs | QLLaMAPairs, Field(discriminator="kind")]

LEAST, MOST = 0.001, 0.5
"""Bounds of the temperature, beyond which it has no gradient; ALBEF clips its value (its published code)."""


@spec
class Twin:
    """A slow copy of the weights, each step by 1 - `momentum`, whose embeddings are what others are compared with.

    `queue` keeps those of so many pairs (ALBEF, arXiv:2107.07651, 3.2; BLIP). Pairs come into it in the order of their rows'
    seeds, so that neither packs nor ranks matter. Every rank has the whole twin, in float32.
    """

    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.995
    queue: Annotated[int, Field(ge=0)] = 65_536


@spec
class Aligned(ModelSpec):
    """An encoder of pictures, one of texts, and what looks from texts at pictures. `weights` None trains all but the encoder
    anew.

    A pair's picture is its document's first. A text begins with `bos` and ends with `eos`. `temperature` is where the learned
    one begins. `weights` name a folder in the form of transformers' class of the kind (BLIP, BLIP-2); those of ALBEF and CoCa
    have none, and QLLaMA's are what such a recipe was exported to. `begins` names the folder of a language model whose layers and
    words it begins from: BERT, for QLLaMA a LLaMA.
    """

    kind: Literal["aligned"] = "aligned"
    encoder: Encoder
    arch: Arch
    twin: Twin | None = None
    weights: str | None = None
    begins: str | None = None
    tokenizer: str | None = None
    bos: str = "[CLS]"
    eos: str = "[SEP]"
    temperature: Annotated[float, Field(gt=0)] = 0.07

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.weights is None:
            raise ValueError(
                "an encoder of texts without weights needs a tokenizer; set model.tokenizer to a folder's name"
            )
        if self.twin is not None and not isinstance(self.arch, ALBEF | BLIP):
            raise ValueError(
                f"{self.arch.kind!r} is trained without a twin; set model.twin to null, or take albef or blip"
            )
        if self.begins is not None and isinstance(self.arch, CoCa):
            raise ValueError(
                f"{self.arch.kind!r} has no language model's layers to begin with; set model.begins to null"
            )
        if self.weights is not None and isinstance(self.arch, ALBEF | CoCa):
            raise ValueError(f"no class of transformers has weights of {self.arch.kind!r}; leave model.weights away")

    @property
    def words(self) -> Words:
        name = self.tokenizer or self.weights
        return Words(tokenizer=name, bos=self.bos, eos=self.eos, vocabulary=self.arch.vocab_size)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for name in (self.encoder.weights, self.weights, self.begins) if name)

    @property
    def learns(self) -> tuple[str, ...]:
        return self.arch.learns

    @property
    def side(self) -> int:
        return getattr(self.encoder.arch, "image", 224)

    def tiny(self) -> Self:
        twin = None if self.twin is None else replace(self.twin, momentum=0.5, queue=min(self.twin.queue, 16))
        small: dict[str, Any] = {
            "weights": None,
            "begins": None,
            "tokenizer": "example-bpe",
            "bos": "<|im_start|>",
            "eos": "<|im_end|>",
        }
        return replace(self, encoder=self.encoder.tiny(), arch=self.arch.tiny(), twin=twin, **small)

    def layout(self, tiling: Tiling) -> VisionLayout:
        check_tiles(tiling, self.side, "the picture's encoder")
        return VisionLayout(shape=tiling.shape, tokens_per_tile=self.encoder.tokens(tiling.size))

    def build(self, folder: Folder = str) -> Aligner:
        return Aligner(self, folder)

    def bare(self) -> Self:
        return replace(self, encoder=self.encoder.bare(), weights=None, begins=None, tokenizer=self.words.tokenizer)


class Aligner(Model):
    """`model(batch)` gives the embeddings of the batch's pictures that have a text, (P, Q * E)."""

    def __init__(self, spec: Aligned, folder: Folder) -> None:
        super().__init__()
        self.encoder = spec.encoder.build(folder)
        self.net: Aligning = spec.arch.build(spec.encoder.width)
        self.temperature = nn.Parameter(torch.full((1,), spec.temperature))
        self.context = spec.arch.context
        self.vocabulary = spec.arch.vocab_size
        self.mask = getattr(spec.arch, "mask", 0)
        if spec.begins is not None:
            begin(self.net, folder(spec.begins))
        if spec.weights is not None and isinstance(spec.arch, QLLaMAPairs):
            go_on(self, folder(spec.weights))
        elif spec.weights is not None:
            from mllm.folders.blip import read

            read(self, spec, folder(spec.weights))
        self.momentum = 0.0 if spec.twin is None else spec.twin.momentum
        self.slow: nn.ModuleDict | None = None
        self.queue: Queue | None = None
        if spec.twin is not None:
            net = as_buffers(self.net)
            shed(net, self.net.slow())
            self.slow = nn.ModuleDict({"tower": as_buffers(self.encoder.tower), "net": net})
            self.queue = Queue(spec.twin.queue, spec.arch.width)
        self._found: dict[tuple[str, int, bool], tuple[Any, Any]] | None = None

    def train(self, mode: bool = True) -> Aligner:
        super().train(mode)
        if self.slow is not None:
            self.slow.eval()
        return self

    @contextmanager
    def once(self) -> Iterator[None]:
        """Within it a batch's pictures are seen once and its texts read once, however many objectives ask."""
        self._found = {}
        try:
            yield
        finally:
            self._found = None

    def _kept(self, what: str, of: Any, make: Callable[[], T]) -> T:
        if self._found is None:
            return make()
        key = what, id(of), torch.is_grad_enabled()
        if key not in self._found:
            self._found[key] = of, make()  # which keeps `of` alive, and its id its own
        return self._found[key][1]

    def given(self, batch: Batch) -> Given:
        """The batch's pairs."""
        return self._kept("given", batch, lambda: given(batch, self.context))

    def features(self, batch: Batch) -> Float[Tensor, "N P D"]:
        """What the encoder sees of all tiles."""
        return self._kept("features", batch, lambda: self.encoder(batch.tiles))

    def _read(self, batch: Batch) -> Tensor:
        return self._kept("read", batch, lambda: self.net.read(self.given(batch).rows))

    def embedded(self, batch: Batch) -> Embedded:
        """Embeddings of the batch's pairs."""

        def make() -> Embedded:
            known = self.given(batch)
            count = len(known.documents)
            looked = self.net.look(self.features(batch)[known.tiles], known.rows.seeds)
            return Embedded(self.net.embed_pictures(looked)[:count], self.net.embed_texts(self._read(batch))[:count])

        return self._kept("embedded", batch, make)

    @torch.no_grad()
    def keys(self, batch: Batch) -> Embedded:
        """What pairs are compared with: embeddings by the twin, where there is one, else by the model itself; no gradient."""
        if self.slow is None:
            own = self.embedded(batch)
            return Embedded(own.images.detach(), own.texts.detach())

        def make() -> Embedded:
            assert self.slow is not None
            known, net = self.given(batch), self._twin()
            count = len(known.documents)
            images = net.embed_pictures(net.look(self._twin_sees(batch)[known.tiles]))
            return Embedded(images[:count], net.embed_texts(net.read(known.rows))[:count])

        return self._kept("keys", batch, make)

    def _twin(self) -> Aligning:
        assert self.slow is not None
        net = self.slow["net"]
        assert isinstance(net, Aligning)
        return net

    @torch.no_grad()
    def _twin_sees(self, batch: Batch) -> Tensor:
        assert self.slow is not None
        tower = self.slow["tower"]

        def make() -> Tensor:
            return tower(normalize(batch.tiles, self.encoder.mean, self.encoder.std).float())

        return self._kept("twin", batch, make)

    def warmth(self) -> Float[Tensor, " 1"]:
        """The temperature within its bounds."""
        return self.temperature.float().clamp(LEAST, MOST)

    def pairs(self, batch: Batch) -> Pairs:
        """The pairs for a contrast of single embeddings. Raises ValueError where a picture has several."""
        found = self.embedded(batch)
        if found.images.shape[1] != 1:
            raise ValueError(
                f"a picture has {found.images.shape[1]} embeddings here, and contrastive takes one; take momentum_contrast"
            )
        scale = 1 / self.warmth()
        return Pairs(found.images[:, 0], found.texts, self.given(batch).documents, scale, scale.new_zeros(1))

    def forward(self, batch: Batch) -> Float[Tensor, "P E"]:
        return self.embedded(batch).images.flatten(1)

    def matched(self, batch: Batch, pairs: Int[Tensor, " n"], rows: Rows) -> Float[Tensor, "S 2"]:
        """Whether each text belongs to the picture of the batch's pair of that number; a blank row of text where n is 0."""
        which = pairs if len(pairs) else pairs.new_zeros(1)
        return self.net.matched(self.features(batch)[self.given(batch).tiles[which]], rows)

    def masked(self, batch: Batch, rows: Rows, at: Bool[Tensor, "S L"]) -> Float[Tensor, "M C"]:
        """Scores of the vocabulary at `at` of the batch's own texts, or what has been made of them."""
        return self.net.masked(self.features(batch)[self.given(batch).tiles], rows, at)

    @torch.no_grad()
    def taught(self, batch: Batch, rows: Rows, at: Bool[Tensor, "S L"]) -> Float[Tensor, "M C"] | None:
        """The twin's scores of the same; None without a twin."""
        if self.slow is None:
            return None
        return self._twin().masked(self._twin_sees(batch)[self.given(batch).tiles], rows, at)

    def caption(self, batch: Batch) -> Float[Tensor, "S L C"]:
        """Scores of the token after each of the batch's texts."""
        known = self.given(batch)
        read = self._read(batch) if self._found is not None else None
        return self.net.caption(self.features(batch)[known.tiles], known.rows, read)

    def trust(self, most: float, ramp: int) -> float:
        """How much the twin is believed: `most`, once `ramp` pairs have gone by, less before."""
        if self.queue is None or not ramp:
            return most
        return most * min(1.0, int(self.queue.seen) / ramp)

    def feed(self, images: Float[Tensor, "A Q E"], texts: Float[Tensor, "A E"]) -> None:
        """Remember a step's pairs, in an order that no rank has of its own."""
        if self.queue is not None:
            self.queue.feed(images[:, 0], texts)

    def stepped(self) -> None:
        if self.slow is not None:
            follow(self.slow["tower"], self.encoder.tower, self.momentum)
            follow(self.slow["net"], self.net, self.momentum)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        heads = [*self.net.heads(), self.temperature]
        inside = {id(p) for p in heads}
        idle = {id(p) for module in self.encoder.unused() for p in module.parameters()}
        layers = [p for unit in self.net.units() for p in unit.parameters()]
        return {
            "vision": [p for p in self.encoder.parameters() if id(p) not in idle],
            "text": [p for p in self.net.parameters() if id(p) not in inside],
            "text.layers": layers,
            "head": heads,
        }

    def main(self) -> dict[str, list[nn.Parameter]]:
        parts = self.parts()
        return {"vision": list(self.encoder.parameters()), "text": parts["text"], "head": parts["head"]}

    def units(self) -> list[nn.Module]:
        return [*self.encoder.units(), *self.net.units()]
