"""Models in the pipeline: filters, captions, codes, frozen features, a reference's log-probabilities.

    ScoreFilter, Recaption, DiscreteCodes,
    GridRegions                               of documents: before rows are measured and packed
    FrozenFeatures, ReferenceLogProbs         of packs: after they are cut, in place of work that the trainer would do
    Instructions (`mllm.instructed`)          of packs as well: prompts in the words of a Q-Former

Each is a value that an actor builds once; what is built is a pure function of the rows or the pack that it is given (greedy
decoding, no dropout), so that a window comes out the same whoever makes it. Weights are `transformers` folders.
To add one: a spec with `documents`, or with `packs` and `empty` (see `pipelines.annotate`), and its name in `Annotator`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from mllm.encoders import Encoder, VisionEncoder
from mllm.instructed import Instructions
from mllm.weights import UntrustedCode, refusal_by_annotator
from ops import images
from ops.losses import linear_cross_entropy
from pipelines import objects, pictures, storage
from pipelines.annotate import Folder, Rows
from pipelines.answers import changed_tokens
from pipelines.place import Place
from pipelines.tiling import Resize
from pipelines.types import (
    Batch,
    Codes,
    Document,
    Image,
    Pack,
    Picture,
    Reason,
    Rejected,
    RowId,
    SkipSample,
    Text,
    Video,
    spec,
)

T = TypeVar("T")

AT_ONCE = 32
"""Pictures or tiles that a model sees together."""


@spec
class ScoreFilter:
    """Leaves out what does not belong together: cosine similarity of a picture and the text after it, by CLIP or SigLIP.

    BLIP's filter (CapFilt, arXiv:2201.12086, 3.3) says instead how sure it is that they match, 0 to 1; BLIP's own takes 0.5.

    A picture below `at_least` is taken out of its document, with nothing else but its regions (MMC4, arXiv:2304.06939, 3); a row
    of which no picture is left, as of a pair, is dropped (LAION, arXiv:2111.02114, 2). The text is the next one that is not
    blank, or the one before where none follows, as far as the model reads. Videos and rows without pictures or text pass.
    """

    kind: Literal["score_filter"] = "score_filter"
    weights: str
    at_least: Annotated[float, Field(ge=-1, le=1)]

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the model. Raises ValueError when the folder holds none of the kind."""
        place = folder(self.weights)
        likeness = (_Matcher if _kind_of(place, ("clip", "siglip", "blip")) == "blip" else _TwoTowers)(place)

        def ask(shown: list[Shown], tiles: Tensor) -> list[float]:
            return likeness(tiles, [_text_of(row, place) for row, place in shown])

        return lambda rows: _by_pictures(rows, _pictures_with_text, likeness.preprocess.tiling, ask, self._kept)

    def _kept(self, row: Document, scores: dict[int, list[float]]) -> Document | Rejected:
        low = {place for place, (score,) in scores.items() if score < self.at_least}
        if not low:
            return row
        if len(low) == sum(not isinstance(segment, Text) for segment in row.segments):
            best = max(score for (score,) in scores.values())
            words = f"similarity {best:.3f}; the recipe asks for {self.at_least:g}"
            return Rejected(row=row.id, reason=Reason.FILTERED, detail=words)
        return _without(row, low)


@spec
class Recaption:
    """Captions written by BLIP's captioner, greedily (CapFilt, arXiv:2201.12086, 3.3); a `ScoreFilter` after it is the filter.

    Of rows that are a picture and its caption; all others pass. "replace" takes the new caption, "add" sets it on a line of its
    own after the old, "either" takes one of the two by the row's name, so that half of the rows keep theirs.
    """

    kind: Literal["recaption"] = "recaption"
    weights: str
    mode: Literal["replace", "add", "either"] = "either"
    tokens: Annotated[int, Field(gt=0)] = 30

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the captioner. Raises ValueError when the folder holds none."""
        write = _Captioner(folder(self.weights), self.tokens)

        def wanted(row: Document) -> list[int]:
            return [0] if _is_pair(row) and self._wanted(row.id) else []

        def ask(_: list[Shown], tiles: Tensor) -> list[str]:
            return write(tiles)

        return lambda rows: _by_pictures(rows, wanted, write.preprocess.tiling, ask, self._captioned)

    def _wanted(self, row: RowId) -> bool:
        name = f"{row.corpus}/{row.shard}/{row.row}".encode()
        return self.mode != "either" or bool(hashlib.sha256(name).digest()[0] & 1)

    def _captioned(self, row: Document, captions: dict[int, list[str]]) -> Document:
        picture, old = row.segments
        (caption,) = captions[0]
        if not caption:
            return row
        assert isinstance(old, Text)  # as `_is_pair` found
        text = f"{old.text}\n{caption}" if self.mode == "add" else f"\n{caption}"
        return replace(row, segments=(picture, replace(old, text=text)))


@spec
class DiscreteCodes:
    """Pictures as tokens: `size` x `size` pixels, squeezed, through the VQ encoder of Chameleon, Janus or Emu3, row by row.

    `first` is the vocabulary's id of code 0 and `codes` the size of the codebook; `before` and `after` are ids around a
    picture's codes (LWM's <vision>, </vision>). A video becomes the codes of its frames, one after the other (LWM,
    arXiv:2402.08268, 4.1). Boxes of a row's pictures are left away with the pictures.
    """

    kind: Literal["discrete_codes"] = "discrete_codes"
    weights: str
    size: Annotated[int, Field(gt=0)]
    first: Annotated[int, Field(ge=0)]
    codes: Annotated[int, Field(gt=0)] = 8192
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """The greatest id of the vocabulary that it may write."""
        return max((self.first + self.codes - 1, *self.before, *self.after))

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the encoder. Raises ValueError when the folder holds none of the kinds, or one of another codebook."""
        encode = _codebook(folder(self.weights), self.codes)
        tiling = Resize(size=self.size, mode="squash")

        def ask(_: list[Shown], tiles: Tensor) -> list[list[int]]:
            return encode(tiles).tolist()

        return lambda rows: _by_pictures(rows, _shown, tiling, ask, self._coded)

    def _coded(self, row: Document, codes: dict[int, list[list[int]]]) -> Document:
        segments: list[Segment] = []
        for place, segment in enumerate(row.segments):
            if place not in codes:
                segments.append(segment)
            for picture in codes.get(place, ()):
                ids = (*self.before, *(self.first + code for code in picture), *self.after)
                segments.append(Codes(ids=ids, role=segment.role))
        return replace(row, segments=tuple(segments), regions=())


@spec
class GridRegions:
    """Regions for pictures that have none beside them: a grid of `rows` x `cols` boxes, each seen by a frozen classifier.

    A stand-in for a detector (grids do as well as objects: arXiv:2001.03615). The picture is squeezed so that a box is `size`
    pixels a side; a box's features are the classifier's pooled ones and its classes the distribution that it gives. Weights are
    those of a ResNet or a ViT with a head.
    """

    kind: Literal["grid_regions"] = "grid_regions"
    weights: str
    rows: Annotated[int, Field(gt=0)] = 6
    cols: Annotated[int, Field(gt=0)] = 6
    size: Annotated[int, Field(gt=0)] = 224

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the classifier. Raises ValueError when the folder holds none of the kinds."""
        look = _classifier(folder(self.weights), self.size)
        boxes = objects.grid(self.rows, self.cols)
        tiling = Resize(size=self.size * max(self.rows, self.cols), mode="squash")

        def ask(_: list[Shown], tiles: Tensor) -> list[bytes]:
            none = np.zeros((len(boxes), 0), np.float32)
            high, wide = self.rows * self.size, self.cols * self.size
            crops = (images.grid(images.resize(tile, high, wide), self.rows, self.cols).flatten(0, 1) for tile in tiles)
            return [objects.packed(objects.Found(*look(each), none, boxes)) for each in crops]

        def bare(row: Document) -> list[int]:
            return [n for n, s in enumerate(row.segments) if isinstance(s, Image) and s.objects is None and s.data]

        return lambda rows: _by_pictures(rows, bare, tiling, ask, self._found)

    def _found(self, row: Document, found: dict[int, list[bytes]]) -> Document:
        segments = [
            replace(s, objects=found[n][0]) if n in found and isinstance(s, Image) else s
            for n, s in enumerate(row.segments)
        ]
        return replace(row, segments=tuple(segments))


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
        """Load the tower: in bfloat16 on a GPU, in float32 elsewhere."""
        device = _device()
        tower = self.encoder.build(folder)
        _settle(tower, device)
        home = None if self.cache is None else f"{folder(self.cache).rstrip('/')}/{self._fingerprint(tower)}"

        def annotate(pack: Pack) -> Pack:
            if not len(pack.tiles):
                return self.empty(pack)
            tiles = torch.from_numpy(np.array(pack.tiles))  # packs that travelled cannot be written to, as torch asks
            features = _computed(tower, tiles, device) if home is None else _cached(tower, tiles, device, home)
            return replace(pack, tiles=np.zeros((0, *pack.tiles.shape[1:]), np.uint8), features=features)

        return annotate

    def empty(self, pack: Pack) -> Pack:
        patches = self.encoder.tokens(pack.tiles.shape[-1])
        return replace(pack, features=np.zeros((0, patches, self.encoder.width), np.uint16))

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
    """Log-probabilities of each document under a frozen reference, as `Pack.references` holds them: what DPO compares with.

    `checkpoint` is an exported run: its recipe, which lies beside the weights, says what model it is. None is the model that the
    stage begins with, which a run exports before the stage. It computes as trainers do, in bfloat16 on a GPU and in float32
    elsewhere; what it says of a pack is the same however often it is asked.
    """

    kind: Literal["reference_log_probs"] = "reference_log_probs"
    checkpoint: str | None = None

    def packs(self, folder: Folder) -> Callable[[Pack], Pack]:
        """Load the reference. Raises FileNotFoundError when the folder is no export, ValueError when there is none yet."""
        from mllm.vlm import VisionLanguageModel

        if self.checkpoint is None:
            raise ValueError(
                "reference_log_probs: the reference is the model that the stage begins with, which is there once a run has come "
                "to it; name an export with `checkpoint` to have references before"
            )
        device = _device()
        model = _exported(folder(self.checkpoint))
        if not isinstance(model, VisionLanguageModel):
            raise ValueError(f"reference_log_probs: the export {self.checkpoint!r} is no model with a language model")
        _settle(model, device)

        @torch.no_grad()
        def annotate(pack: Pack) -> Pack:
            batch = Batch.of(pack, device)
            each = -linear_cross_entropy(model(batch), model.lm.head, batch.labels).each
            changed = changed_tokens(batch.labels.cpu().numpy(), batch.cu_seqlens.tolist(), batch.branches.tolist())
            columns = torch.stack([each, each * torch.from_numpy(changed).to(device)], dim=1)
            sums = each.new_zeros(len(batch.sources), 2).index_add_(0, batch.document_of_token(), columns)
            return replace(pack, references=sums.float().cpu().numpy()[: len(pack.sources)])

        return annotate

    def empty(self, pack: Pack) -> Pack:
        return replace(pack, references=np.zeros((0, 2), np.float32))


def _exported(place: str) -> nn.Module:
    """The model of an export, fetched to this machine's disk first where it lies on S3."""
    from mllm.export import read_back

    home = Place(place)
    if home.local:
        return read_back(home.path)
    with TemporaryDirectory() as scratch:
        for file in storage.glob(f"{home.uri}/**"):
            copy = Path(scratch) / file.removeprefix(f"{home.uri}/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(storage.read(file))
        return read_back(Path(scratch))


Annotator = Annotated[
    ScoreFilter | Recaption | DiscreteCodes | GridRegions | FrozenFeatures | ReferenceLogProbs | Instructions,
    Field(discriminator="kind"),
]


# --- pictures of rows -------------------------------------------------------------------------------------------------

Segment = Text | Image | Video | Codes
Shown = tuple[Document, int]
"""A row, and the place of the segment in it that a picture is of."""


def _by_pictures(
    rows: Rows,
    places: Callable[[Document], Sequence[int]],
    tiling: Resize,
    ask: Callable[[list[Shown], Tensor], Sequence[T]],
    change: Callable[[Document, dict[int, list[T]]], Document | Rejected],
) -> Rows:
    """`rows`, each changed by what a model says of its pictures.

    `places` names the segments of a row that are shown; `ask` gets tiles uint8 (n, 3, S, S), `AT_ONCE` at most, and gives
    an answer for each; `change` gets a row and, by place, the answers to its pictures, of which a video has several. Rows
    without such segments pass; one with a picture that is broken, or beyond the usual `Limits`, is rejected. Headers
    are read first, and no more than `AT_ONCE` tiles are held: a window's pictures would not fit into memory.
    """
    asked: list[tuple[int, int, Picture]] = []
    broken: dict[int, SkipSample] = {}
    for n, row in enumerate(rows):
        if isinstance(row, Document):
            try:
                asked += [(n, place, picture) for place in places(row) for picture in _measured(row, place, tiling)]
            except SkipSample as skip:
                broken[n] = skip
    answers: dict[int, dict[int, list[T]]] = {}
    for start in range(0, len(asked), AT_ONCE):
        tiles = _tiles(asked[start : start + AT_ONCE], tiling, broken)
        if not tiles:
            continue
        shown: list[Shown] = []
        for (n, place), some in tiles.items():
            row = rows[n]
            assert isinstance(row, Document)  # only such were asked about
            shown += [(row, place)] * len(some)
        said = iter(ask(shown, torch.cat(list(tiles.values()))))
        for (n, place), some in tiles.items():
            answers.setdefault(n, {}).setdefault(place, []).extend(islice(said, len(some)))
    return [_changed(row, broken.get(n), answers.get(n), change) for n, row in enumerate(rows)]


def _changed(
    row: Document | Rejected,
    broken: SkipSample | None,
    answers: dict[int, list[T]] | None,
    change: Callable[[Document, dict[int, list[T]]], Document | Rejected],
) -> Document | Rejected:
    if isinstance(row, Rejected):
        return row
    if broken is not None:
        return Rejected(row=row.id, reason=broken.reason, detail=broken.detail)
    return row if answers is None else change(row, answers)


def _measured(row: Document, place: int, tiling: Resize) -> list[Picture]:
    """The pictures of one segment: one, or a video's frames. Raises SkipSample."""
    alone = pictures.measure(replace(row, segments=(row.segments[place],)), tiling)
    return [picture for picture in alone.segments if isinstance(picture, Picture)]


def _tiles(
    asked: Sequence[tuple[int, int, Picture]], tiling: Resize, broken: dict[int, SkipSample]
) -> dict[tuple[int, int], Tensor]:
    """Tiles uint8 (n, 3, S, S) by row and place; rows of which a picture is broken go to `broken`."""
    found: dict[tuple[int, int], Tensor] = {}
    for (n, place), some in groupby(asked, key=lambda one: one[:2]):
        if n in broken:
            continue
        try:
            found[n, place] = torch.from_numpy(pictures.pixels([picture for _, _, picture in some], tiling))
        except SkipSample as skip:
            broken[n] = skip
    return {(n, place): tiles for (n, place), tiles in found.items() if n not in broken}


def _images(row: Document) -> list[int]:
    return [place for place, segment in enumerate(row.segments) if isinstance(segment, Image)]


def _shown(row: Document) -> list[int]:
    return [place for place, segment in enumerate(row.segments) if isinstance(segment, (Image, Video))]


def _pictures_with_text(row: Document) -> list[int]:
    return _images(row) if any(isinstance(s, Text) and s.text.strip() for s in row.segments) else []


def _text_of(row: Document, place: int) -> str:
    """The text that follows a picture, or the one before where none does; the row has some."""
    after = [s.text for s in row.segments[place + 1 :] if isinstance(s, Text) and s.text.strip()]
    before = [s.text for s in row.segments[:place] if isinstance(s, Text) and s.text.strip()]
    return (after[0] if after else before[-1]).strip()


def _is_pair(row: Document) -> bool:
    return [type(segment) for segment in row.segments] == [Image, Text] and not row.rejected


def _without(row: Document, places: set[int]) -> Document:
    """The row without some of its pictures; boxes go with theirs, and follow the others' new numbers."""
    left = [number for number, place in enumerate(_images(row)) if place not in places]
    regions = [replace(region, image=left.index(region.image)) for region in row.regions if region.image in left]
    segments = [segment for place, segment in enumerate(row.segments) if place not in places]
    return replace(row, segments=tuple(segments), regions=tuple(regions))


# --- transformers' models ---------------------------------------------------------------------------------------------


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _settle(model: nn.Module, device: torch.device) -> None:
    """Freeze `model` on `device`: on a GPU with weights in bfloat16, which is what layers compute in when they are trained.

    Tables that lie beside the weights (an encoder's mean, rotary angles) stay in float32; batch statistics are weights here.
    """
    model.to(device).eval().requires_grad_(False)
    if device.type != "cuda":
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.to(torch.bfloat16)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.bfloat16)


def _kind_of(folder: str, known: Sequence[str]) -> str:
    """The `model_type` of a folder of weights. Raises ValueError when it is none of `known` or brings code of its own,
    FileNotFoundError without one."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file}: name a folder of weights that transformers wrote, or map it under [weights]"
        )
    if why := refusal_by_annotator(folder):
        raise UntrustedCode(why)
    kind = json.loads(file.read_text()).get("model_type")
    if kind not in known:
        raise ValueError(f"{folder} holds a model of type {kind!r}; this annotator reads {', '.join(known)}")
    return kind


class _Preprocess:
    """Pictures as a model of transformers wants them, by its `preprocessor_config.json`; CLIP's own numbers without one.

    Resizing is bicubic whatever the file says. Cut to the middle square where it says so or, where it says nothing, `crop`.
    """

    def __init__(self, folder: str, size: int, crop: bool) -> None:
        file = Path(folder) / "preprocessor_config.json"
        said = json.loads(file.read_text()) if file.is_file() else {}
        clip = Encoder.__dataclass_fields__
        scale = 255 * said.get("rescale_factor", 1 / 255)  # `normalize` divides by 255
        self.mean = torch.tensor(said.get("image_mean", clip["mean"].default)) / scale
        self.std = torch.tensor(said.get("image_std", clip["std"].default)) / scale
        self.tiling = Resize(size=size, mode="crop" if said.get("do_center_crop", crop) else "squash")

    def __call__(self, tiles: Tensor, device: torch.device) -> Tensor:
        """uint8 (n, 3, S, S) -> float32 of that shape on `device`."""
        return images.normalize(tiles.to(device), self.mean.to(device), self.std.to(device))


class _TwoTowers:
    """Cosine similarity of pictures and texts."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        kind = _kind_of(folder, ("clip", "siglip"))
        self.device = _device()
        self.model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        self.model.to(self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.preprocess = _Preprocess(folder, self.model.config.vision_config.image_size, crop=kind == "clip")
        self.length = self.model.config.text_config.max_position_embeddings
        self.padding = "max_length" if kind == "siglip" else "longest"  # SigLIP was trained on texts padded to the end

    @torch.no_grad()
    def __call__(self, tiles: Tensor, texts: list[str]) -> list[float]:
        words = self.tokenizer(
            texts, return_tensors="pt", padding=self.padding, truncation=True, max_length=self.length
        ).to(self.device)
        out = self.model(pixel_values=self.preprocess(tiles, self.device), **words)
        return torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).tolist()


class _Matcher:
    """How sure BLIP is that a text belongs to a picture: the "yes" of its matching head."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer, BlipForImageTextRetrieval

        self.device = _device()
        self.model: Any = BlipForImageTextRetrieval.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        self.model.to(self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.preprocess = _Preprocess(folder, self.model.config.vision_config.image_size, crop=False)
        config = self.model.config.text_config
        self.mark = config.bos_token_id + 1  # [ENC], which in BLIP's vocabulary follows [DEC]
        self.length = min(config.max_position_embeddings, 40)

    @torch.no_grad()
    def __call__(self, tiles: Tensor, texts: list[str]) -> list[float]:
        begins = self.tokenizer.cls_token_id is not None
        words = self.tokenizer(texts, truncation=True, max_length=self.length - (not begins)).input_ids
        marked = [torch.tensor([self.mark, *ids[begins:]]) for ids in words]
        ids = torch.nn.utils.rnn.pad_sequence(marked, batch_first=True, padding_value=-1).to(self.device)
        pixels = self.preprocess(tiles, self.device)
        there = (ids >= 0).long()
        scores = self.model(input_ids=ids.clamp(min=0), attention_mask=there, pixel_values=pixels).itm_score
        return scores.softmax(1)[:, 1].tolist()


class _Captioner:
    """BLIP's captions of pictures."""

    def __init__(self, folder: str, tokens: int) -> None:
        from transformers import AutoTokenizer, BlipForConditionalGeneration

        _kind_of(folder, ("blip",))
        self.device = _device()
        self.model: Any = BlipForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        self.model.to(self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.preprocess = _Preprocess(folder, self.model.config.vision_config.image_size, crop=False)
        self.tokens = tokens

    @torch.no_grad()
    def __call__(self, tiles: Tensor) -> list[str]:
        pixels = self.preprocess(tiles, self.device)
        written = self.model.generate(pixels, max_new_tokens=self.tokens, num_beams=1, do_sample=False)
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]


def _classifier(folder: str, size: int) -> Callable[[Tensor], tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """uint8 (n, 3, S, S) -> pooled features (n, F) and class probabilities (n, C), by the classifier in `folder`."""
    from transformers import AutoModelForImageClassification

    kind = _kind_of(folder, ("resnet", "vit"))
    device = _device()
    preprocess = _Preprocess(folder, size, crop=False)
    model: Any = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model.to(device).eval()

    @torch.no_grad()
    def look(pixels: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        seen = preprocess(pixels, device)
        resnet = kind == "resnet"
        pooled = model.resnet(seen).pooler_output.flatten(1) if resnet else model.vit(seen).last_hidden_state[:, 0]
        scores = model.classifier(pooled).softmax(1)
        return pooled.cpu().numpy(), scores.cpu().numpy()

    return look


def _codebook(folder: str, codes: int) -> Callable[[Tensor], Tensor]:
    """uint8 (n, 3, S, S) -> codes int64 (n, cells), by the VQ encoder in `folder`. Raises ValueError, see `DiscreteCodes`."""
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
    from transformers.models.janus.modeling_janus import JanusVQVAE

    kinds = {"chameleon_vqgan": ChameleonVQVAE, "janus_vqgan": JanusVQVAE, "emu3_vqgan": Emu3VQVAE}
    kind = _kind_of(folder, tuple(kinds))
    device = _device()
    model: Any = kinds[kind].from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model.to(device).eval()
    emu3 = kind == "emu3_vqgan"
    found = model.config.codebook_size if emu3 else model.config.num_embeddings
    if found != codes:
        raise ValueError(f"{folder} has a codebook of {found} and the recipe says codes={codes}; set codes to {found}")

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        seen = pixels.to(device).float() / 127.5 - 1
        if emu3:  # it gives back only so much of each picture as `image_sizes` says
            return (
                torch.stack(model.encode(seen, image_sizes=[pixels.shape[2:]] * len(pixels)).image_tokens)
                .flatten(1)
                .cpu()
            )
        return model.encode(seen).image_tokens.reshape(len(pixels), -1).cpu()

    return encode
