"""Models in the pipeline: filters, captions, codes, frozen features, a reference's log-probabilities.

    ScoreFilter, Recaption, DiscreteCodes     of documents: before rows are measured and packed
    FrozenFeatures, ReferenceLogProbs         of packs: after they are cut, in place of work that the trainer would do

Each is a value that an actor builds once; what is built is a pure function of the rows or the pack that it is given (greedy
decoding, no dropout), so that a window comes out the same whoever makes it. Weights are `transformers` folders.
To add one: a spec with `documents`, or with `packs` and `empty` (see `pipelines.annotate`), and its name in `Annotator`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor

from mllm.encoders import Encoder, VisionEncoder
from ops import images
from ops.losses import linear_cross_entropy
from pipelines import storage
from pipelines.annotate import Folder, Rows
from pipelines.pictures import decode
from pipelines.tiling import Resize
from pipelines.types import NOT_LEARNED, Batch, Codes, Document, Image, Pack, Reason, Rejected, SkipSample, Text, spec

AT_ONCE = 32
"""Pictures or tiles that a model sees together."""


@spec
class ScoreFilter:
    """Leaves out what does not belong together: cosine similarity of a picture and the text after it, by CLIP or SigLIP.

    A picture below `at_least` is taken out of its document, with nothing else (MMC4, arXiv:2304.06939, 3); a row of which no
    picture is left, as of a pair, is dropped (LAION, arXiv:2111.02114, 2). Rows without pictures pass.
    """

    kind: Literal["score_filter"] = "score_filter"
    weights: str
    at_least: float

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the two towers. Raises ValueError when the folder holds no model of the kind."""
        likeness = _TwoTowers(folder(self.weights))

        def annotate(rows: Rows) -> Rows:
            asked = [(n, place, text) for n, row in enumerate(rows) for place, text in _pictures_with_text(row)]
            pictures = _decoded(rows, [(n, place) for n, place, _ in asked])
            texts = {(n, place): text for n, place, text in asked}
            scores = likeness({at: (pixels, texts[at]) for at, pixels in pictures.sound.items()})
            return [self._kept(row, n, scores, pictures.broken.get(n)) for n, row in enumerate(rows)]

        return annotate

    def _kept(
        self, row: Document | Rejected, number: int, scores: dict[tuple[int, int], float], broken: SkipSample | None
    ) -> Document | Rejected:
        if isinstance(row, Rejected):
            return row
        if broken is not None:
            return Rejected(row=row.id, reason=broken.reason, detail=broken.detail)
        mine = {place: score for (n, place), score in scores.items() if n == number}
        low = {place for place, score in mine.items() if score < self.at_least}
        if not low:
            return row
        if len(low) == sum(not isinstance(segment, Text) for segment in row.segments):
            best = max(mine.values())
            words = f"similarity {best:.3f}; the recipe asks for {self.at_least:g}"
            return Rejected(row=row.id, reason=Reason.FILTERED, detail=words)
        return replace(row, segments=tuple(s for place, s in enumerate(row.segments) if place not in low))


@spec
class Recaption:
    """Captions written by BLIP's captioner, greedily (CapFilt, arXiv:2201.12086, 3.3); a `ScoreFilter` after it is the filter.

    Of rows that are a picture and its caption. "replace" takes the new caption, "add" sets it on a line of its own after the
    old, "either" takes one of the two by the row's name, so that half of the rows keep theirs.
    """

    kind: Literal["recaption"] = "recaption"
    weights: str
    mode: Literal["replace", "add", "either"] = "either"
    tokens: Annotated[int, Field(gt=0)] = 30

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the captioner."""
        write = _Captioner(folder(self.weights), self.tokens)

        def annotate(rows: Rows) -> Rows:
            asked = [(n, 0) for n, row in enumerate(rows) if _is_pair(row) and self._wanted(row)]
            pictures = _decoded(rows, asked)
            captions = write(pictures.sound)
            found: list[Document | Rejected] = []
            for n, row in enumerate(rows):
                if isinstance(row, Document) and n in pictures.broken:
                    skip = pictures.broken[n]
                    found.append(Rejected(row=row.id, reason=skip.reason, detail=skip.detail))
                else:
                    found.append(self._captioned(row, captions.get((n, 0))))
            return found

        return annotate

    def _wanted(self, row: Document | Rejected) -> bool:
        if self.mode != "either":
            return True
        at = row.id if isinstance(row, Document) else row.row
        return bool(hashlib.sha256(f"{at.corpus}/{at.shard}/{at.row}".encode()).digest()[0] & 1)

    def _captioned(self, row: Document | Rejected, caption: str | None) -> Document | Rejected:
        if caption is None or isinstance(row, Rejected):
            return row
        picture, old = row.segments
        assert isinstance(old, Text)
        text = f"{old.text}\n{caption}" if self.mode == "add" else f"\n{caption}"
        return replace(row, segments=(picture, replace(old, text=text)))


@spec
class DiscreteCodes:
    """Pictures as tokens: `size` x `size` pixels, squeezed, through the VQ encoder of Chameleon or Janus, row by row.

    `first` is the vocabulary's id of code 0; `before` and `after` are ids around a picture's codes (LWM's <vision>, </vision>).
    """

    kind: Literal["discrete_codes"] = "discrete_codes"
    weights: str
    size: Annotated[int, Field(gt=0)]
    first: Annotated[int, Field(ge=0)]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the encoder. Raises ValueError when the folder holds none of the kinds."""
        encode = _codebook(folder(self.weights))

        def annotate(rows: Rows) -> Rows:
            asked = [(n, place) for n, row in enumerate(rows) for place in _pictures(row)]
            pictures = _decoded(rows, asked)
            codes: dict[tuple[int, int], list[int]] = {}
            for some in _batches(pictures.sound):
                squeezed = [images.resize(pictures.sound[at], self.size, self.size) for at in some]
                codes |= dict(zip(some, encode(torch.stack(squeezed)).tolist(), strict=True))
            return [self._coded(row, n, codes, pictures.broken.get(n)) for n, row in enumerate(rows)]

        return annotate

    def _coded(
        self, row: Document | Rejected, number: int, codes: dict[tuple[int, int], list[int]], broken: SkipSample | None
    ) -> Document | Rejected:
        if isinstance(row, Rejected):
            return row
        if broken is not None:
            return Rejected(row=row.id, reason=broken.reason, detail=broken.detail)
        segments = tuple(
            Codes(ids=(*self.before, *(self.first + code for code in codes[number, place]), *self.after), role=s.role)
            if isinstance(s, Image)
            else s
            for place, s in enumerate(row.segments)
        )
        return replace(row, segments=segments)


@spec
class FrozenFeatures:
    """The frozen encoder run in the pipeline: packs carry features, bfloat16 (N, P, D), in place of tiles.

    With `cache`, a folder or an address (or the name of one, as weights have names), each different tile's features are kept
    there, one file of 2 P D bytes a tile under the SHA-256 of its pixels and of all that decides them: a second epoch then
    reads 1.2 MB for each tile of CLIP-L/336 instead of running the tower. Worth it where storage is nearer than the GPU is
    idle. Loading hashes the tower's weights, about a second a gigabyte.
    """

    kind: Literal["frozen_features"] = "frozen_features"
    encoder: Encoder
    cache: str | None = None

    def packs(self, folder: Folder) -> Callable[[Pack], Pack]:
        """Load the tower: in bfloat16 on a GPU, in float32 elsewhere; pixels are normalised in float32 on both."""
        device = _device()
        tower = self.encoder.build(folder).eval()
        tower.requires_grad_(False)
        tower.to(device).tower.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        home = None if self.cache is None else f"{folder(self.cache).rstrip('/')}/{self._fingerprint(tower)}"

        def annotate(pack: Pack) -> Pack:
            if not len(pack.tiles):
                return self.empty(pack)
            tiles = torch.from_numpy(np.array(pack.tiles))  # packs that travelled cannot be written to, as torch asks
            features = _computed(tower, tiles, device) if home is None else _cached(tower, tiles, device, home)
            return replace(pack, tiles=np.zeros((0, *pack.tiles.shape[1:]), np.uint8), features=features)

        return annotate

    def empty(self, pack: Pack) -> Pack:
        patches = self.encoder.arch.tokens(pack.tiles.shape[-1])
        return replace(pack, features=np.zeros((0, patches, self.encoder.arch.width), np.uint16))

    def _fingerprint(self, tower: VisionEncoder) -> str:
        """Of all that decides features: how the tower is read, the numbers it computes in, its weights (not their name)."""
        digest = hashlib.sha256(TypeAdapter(Encoder).dump_json(replace(self.encoder, weights=None)))
        for name, value in sorted(tower.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def _computed(tower: VisionEncoder, tiles: Tensor, device: torch.device) -> NDArray[np.uint16]:
    """Features of `tiles`, bfloat16 bits (n, P, D)."""
    found = [tower(some.to(device)).to(torch.bfloat16).cpu() for some in tiles.split(AT_ONCE)]
    return torch.cat(found).contiguous().view(torch.int16).numpy().view(np.uint16)


def _cached(tower: VisionEncoder, tiles: Tensor, device: torch.device, home: str) -> NDArray[np.uint16]:
    """The same, of which only those are computed that `home` does not hold whole; a tile that comes twice, once.

    A file is the features' P and D, two int32, and their bits.
    """
    names = [hashlib.sha256(tile.numpy().data).hexdigest() for tile in tiles]
    first = {name: number for number, name in reversed([*enumerate(names)])}
    places = {name: f"{home}/{name[:2]}/{name}" for name in first}
    stored = storage.read_many([(place, None, None) for place in places.values()])
    found = {name: _unpacked(data) for name, data in zip(places, stored, strict=True)}
    missing = [name for name, features in found.items() if features is None]
    if missing:
        fresh = _computed(tower, tiles[[first[name] for name in missing]], device)
        found |= dict(zip(missing, fresh, strict=True))
        with ThreadPoolExecutor(storage.AT_ONCE) as pool:
            list(pool.map(lambda name, one: storage.write(places[name], _packed(one)), missing, fresh))
    return np.stack([features for name in names if (features := found[name]) is not None])


def _packed(features: NDArray[np.uint16]) -> bytes:
    return np.array(features.shape, "<i4").tobytes() + features.astype("<u2").tobytes()


def _unpacked(data: bytes | None) -> NDArray[np.uint16] | None:
    """What `_packed` wrote, or None where nothing lies there or not all of it."""
    if data is None or len(data) < 8:
        return None
    patches, width = np.frombuffer(data, "<i4", 2).tolist()
    return (
        np.frombuffer(data, "<u2", offset=8).reshape(patches, width) if len(data) == 8 + 2 * patches * width else None
    )


@spec
class ReferenceLogProbs:
    """Log-probability, summed over learned tokens, of each document under a frozen reference: what DPO compares with.

    `checkpoint` is an exported run: its recipe, which lies beside the weights, says what model it is.
    """

    kind: Literal["reference_log_probs"] = "reference_log_probs"
    checkpoint: str

    def packs(self, folder: Folder) -> Callable[[Pack], Pack]:
        """Load the reference. Raises FileNotFoundError when the folder is no export."""
        from mllm.export import read_back

        device = _device()
        model = read_back(Path(folder(self.checkpoint))).to(device).eval()
        model.requires_grad_(False)

        @torch.no_grad()
        def annotate(pack: Pack) -> Pack:
            batch = Batch.of(pack, device)
            losses, _ = linear_cross_entropy(model(batch), model.lm.head, batch.labels)
            learned = losses * (batch.labels != NOT_LEARNED)
            sums = torch.zeros(len(batch.sources), device=device).index_add_(0, batch.document_of_token(), -learned)
            return replace(pack, references=sums.float().cpu().numpy()[: len(pack.sources)])

        return annotate

    def empty(self, pack: Pack) -> Pack:
        return replace(pack, references=np.zeros(0, np.float32))


Annotator = Annotated[
    ScoreFilter | Recaption | DiscreteCodes | FrozenFeatures | ReferenceLogProbs, Field(discriminator="kind")
]


# --- pictures of rows -------------------------------------------------------------------------------------------------


@spec
class _Decoded:
    """Pictures by row and place of the segment, uint8 (3, h, w), and of rows with a broken one why it is."""

    sound: dict[tuple[int, int], Tensor]
    broken: dict[int, SkipSample]


def _decoded(rows: Rows, places: Sequence[tuple[int, int]]) -> _Decoded:
    sound: dict[tuple[int, int], Tensor] = {}
    broken: dict[int, SkipSample] = {}
    for n, place in places:
        row = rows[n]
        segment = row.segments[place] if isinstance(row, Document) else None
        if isinstance(segment, Image) and n not in broken:
            try:
                sound[n, place] = decode(segment)
            except SkipSample as skip:
                broken[n] = skip
    return _Decoded(sound={at: pixels for at, pixels in sound.items() if at[0] not in broken}, broken=broken)


def _pictures(row: Document | Rejected) -> list[int]:
    return [i for i, s in enumerate(row.segments) if isinstance(s, Image)] if isinstance(row, Document) else []


def _pictures_with_text(row: Document | Rejected) -> Iterator[tuple[int, str]]:
    """Each picture's place, and the text that follows it, or the one before where none does."""
    if isinstance(row, Rejected):
        return
    for place in _pictures(row):
        after = [s.text for s in row.segments[place + 1 :] if isinstance(s, Text) and s.text.strip()]
        before = [s.text for s in row.segments[:place] if isinstance(s, Text) and s.text.strip()]
        if after or before:
            yield place, (after[0] if after else before[-1]).strip()


def _is_pair(row: Document | Rejected) -> bool:
    return isinstance(row, Document) and [type(segment) for segment in row.segments] == [Image, Text]


def _batches(found: dict[tuple[int, int], Any]) -> Iterator[list[tuple[int, int]]]:
    places = list(found)
    for start in range(0, len(places), AT_ONCE):
        yield places[start : start + AT_ONCE]


# --- transformers' models ---------------------------------------------------------------------------------------------


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _kind_of(folder: str, known: Sequence[str]) -> str:
    """The `model_type` of a folder of weights. Raises ValueError when it is none of `known`, FileNotFoundError without one."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file}: name a folder of weights that transformers wrote, or map it under [weights]"
        )
    kind = json.loads(file.read_text()).get("model_type")
    if kind not in known:
        raise ValueError(f"{folder} holds a model of type {kind!r}; this annotator reads {', '.join(known)}")
    return kind


class _Preprocess:
    """Pictures as a model of transformers wants them, by its `preprocessor_config.json`; CLIP's own numbers without one."""

    def __init__(self, folder: str, size: int, squeezed: bool) -> None:
        file = Path(folder) / "preprocessor_config.json"
        said = json.loads(file.read_text()) if file.is_file() else {}
        clip = Encoder.__dataclass_fields__
        self.mean = torch.tensor(said.get("image_mean", clip["mean"].default))
        self.std = torch.tensor(said.get("image_std", clip["std"].default))
        self.tiling = Resize(size=size, mode="squash" if squeezed else "crop")

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        cuts = [self.tiling.cut(*picture.shape[1:]) for picture in pictures]
        tiles = torch.cat([self.tiling.tile(picture, cut) for picture, cut in zip(pictures, cuts, strict=True)])
        return images.normalize(tiles, self.mean, self.std)


class _TwoTowers:
    """Cosine similarity of pictures and texts."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        kind = _kind_of(folder, ("clip", "siglip"))
        self.device = _device()
        self.model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.preprocess = _Preprocess(folder, self.model.config.vision_config.image_size, squeezed=kind == "siglip")
        self.length = self.model.config.text_config.max_position_embeddings
        self.padding = "max_length" if kind == "siglip" else "longest"  # SigLIP was trained on texts padded to the end

    @torch.no_grad()
    def __call__(self, asked: dict[tuple[int, int], tuple[Tensor, str]]) -> dict[tuple[int, int], float]:
        scores: dict[tuple[int, int], float] = {}
        for some in _batches(asked):
            pixels = self.preprocess([asked[at][0] for at in some]).to(self.device)
            texts = [asked[at][1] for at in some]
            words = self.tokenizer(
                texts, return_tensors="pt", padding=self.padding, truncation=True, max_length=self.length
            ).to(self.device)
            out = self.model(pixel_values=pixels, **words)
            found = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            scores |= dict(zip(some, found.tolist(), strict=True))
        return scores


class _Captioner:
    """BLIP's captions of pictures."""

    def __init__(self, folder: str, tokens: int) -> None:
        from transformers import AutoTokenizer, BlipForConditionalGeneration

        _kind_of(folder, ("blip",))
        self.device = _device()
        self.model: Any = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.to(self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.preprocess = _Preprocess(folder, self.model.config.vision_config.image_size, squeezed=True)
        self.tokens = tokens

    @torch.no_grad()
    def __call__(self, pictures: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], str]:
        captions: dict[tuple[int, int], str] = {}
        for some in _batches(pictures):
            pixels = self.preprocess([pictures[at] for at in some]).to(self.device)
            written = self.model.generate(pixels, max_new_tokens=self.tokens, num_beams=1, do_sample=False)
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            captions |= {at: text.strip() for at, text in zip(some, texts, strict=True)}
        return {at: text for at, text in captions.items() if text}


def _codebook(folder: str) -> Callable[[Tensor], Tensor]:
    """uint8 (n, 3, S, S) -> codes int64 (n, cells), by the VQ encoder in `folder`."""
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    from transformers.models.janus.modeling_janus import JanusVQVAE

    kind = _kind_of(folder, ("chameleon_vqgan", "janus_vqgan"))
    device = _device()
    model: Any = (ChameleonVQVAE if kind == "chameleon_vqgan" else JanusVQVAE).from_pretrained(folder).to(device).eval()

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        seen = pixels.to(device).float() / 127.5 - 1
        return model.encode(seen).image_tokens.reshape(len(pixels), -1).cpu()

    return encode
