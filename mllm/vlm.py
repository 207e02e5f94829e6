"""A vision-language model from four parts: encode -> connect -> fuse -> decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.archs import T5, Llama, Mistral, Qwen2
from mllm.chance import tile_seeds
from mllm.connectors import (
    MLP,
    SVA,
    Connector,
    ConvGLU,
    CrossPool,
    FirstFeature,
    Linear,
    PatchMining,
    Perceiver,
    PixelShuffle,
    Pool,
    Transformer,
    bare,
    read_weights,
)
from mllm.encoders import Encoder, Encoders, Folder, VisionEncoder
from mllm.folders.wholes import check_form, read_into
from mllm.fusion import (
    CrossAttention,
    Fusion,
    InLMSampler,
    PreLMAdapter,
    PromptAdapter,
    RoutedExperts,
    SideAttention,
    Splice,
    UnifiedVocabulary,
)
from mllm.instructed import InstructedQuerying, asked_of_tiles
from mllm.joins import Joined, Joining, Tiles, cuts_of, slice_grids, with_scales
from mllm.lm import CausalLM
from mllm.model import Model, ModelSpec, Words
from mllm.pairs import frames_of
from mllm.pooled import Mappings
from ops.attention import Backend
from pipelines.objects import Objects
from pipelines.tiling import Tiling
from pipelines.types import Batch, Cut, VisionLayout, spec


@spec
class VLM(ModelSpec):
    """The model's axes as values. Building it needs no network when nothing names weights.

    `weights` name a folder of the whole model as transformers has it (`mllm.folders.wholes`), in place of what its parts name.
    """

    kind: Literal["vlm"] = "vlm"
    encoder: Encoder | Encoders
    connector: Connector
    lm: CausalLM
    fusion: Fusion = Splice()
    join: Joining = Tiles()
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            check_form(self)
        several = isinstance(self.encoder, Encoders) and not self.one_stands_beside
        self._looks_beside()
        if several != isinstance(self.connector, SVA | PatchMining):
            number = len(self.encoder.towers)
            raise ValueError(
                f"connector {self.connector.kind!r} takes {'one tower' if several else 'several towers'} and the encoder has "
                f"{number}; take {'sva or patch_mining, or one encoder' if several else 'another connector, or encoders'}"
            )
        if several and self.join.kind in ("scales", "slices"):
            raise ValueError(
                f"join {self.join.kind!r} is for one tower, and the encoder has {len(self.encoder.towers)}"
            )

        marked = isinstance(self.connector, ConvGLU) and self.connector.marks  # which stand on no grid
        grid = Linear | MLP | PixelShuffle | Pool | Transformer | ConvGLU | PatchMining
        if self.join.kind == "unpad" and (marked or not isinstance(self.connector, grid)):
            raise ValueError(
                f"join 'unpad' cuts margins off a grid of features, and connector {self.connector.kind!r} keeps none; take one "
                "that does (linear, mlp, pixel_shuffle, pool), or a tiling of tiles"
            )
        if isinstance(self.connector, FirstFeature) and any(tower.cls == "drop" for tower in self.encoder.towers):
            raise ValueError(
                "connector 'first_feature' makes a picture's tokens of the tower's CLS, and encoder.cls is 'drop'; set it to "
                "'keep'"
            )
        width = self.encoder.towers[0].width
        wanted = self.fusion.width(width, self.lm.arch.hidden_size)
        if self.reads_videos and (self.join != Tiles() or isinstance(self.fusion, PromptAdapter)):
            raise ValueError(
                "connector.frames makes the tokens of one tile of a whole video, which join 'tiles' without separators lays down "
                f"and fusion 'prompt_adapter' does not read, and this is join {self.join.kind!r} with fusion "
                f"{self.fusion.kind!r}; take another of them, or set connector.frames to 0"
            )
        if isinstance(self.connector, Perceiver) and not self.connector.projected and wanted != width:
            raise ValueError(
                f"connector 'perceiver' is not projected, so its tokens are as wide as the features, {width}, and fusion "
                f"{self.fusion.kind!r} takes {wanted}; set connector.projected, or take cross_attention"
            )
        if isinstance(self.fusion, RoutedExperts) and not isinstance(self.lm.arch, Llama | Qwen2 | Mistral | T5):
            raise ValueError(
                f"fusion 'routed_experts' knows layers of Llama's form, and {self.lm.arch.kind!r} has others; take a llama, "
                "qwen2 or mistral as the language model"
            )
        if isinstance(self.lm.arch, T5) and not isinstance(self.fusion, Splice | PreLMAdapter | UnifiedVocabulary):
            raise ValueError(
                f"fusion {self.fusion.kind!r} works inside a decoder's layers, and {self.lm.arch.kind!r} is none; take splice or "
                "pre_lm_adapter, or a decoder"
            )

    def _looks_beside(self) -> None:
        """What the fusion looks at beside the visual tokens must be there."""
        number = len(self.encoder.towers)
        if isinstance(self.fusion, SideAttention) and number != 2:
            raise ValueError(
                f"fusion 'side_attention' looks from one tower's tokens at another, and the encoder has {number}; give it two"
            )
        if isinstance(self.fusion, InLMSampler) and not isinstance(self.connector, SVA):
            raise ValueError(
                f"fusion 'in_lm_sampler' looks at the cells of the connector 'sva', and it is {self.connector.kind!r}; take "
                "sva or another fusion"
            )
        if isinstance(self.fusion, InLMSampler) and self.join != Tiles():
            raise ValueError(
                "fusion 'in_lm_sampler' finds its queries by their place in the sequence, where the join puts marks between "
                "them; take the join 'tiles' without separators"
            )

    @property
    def reads_videos(self) -> bool:
        """Whether the frames of a video become the tokens of one tile, all together."""
        return isinstance(self.connector, Perceiver) and self.connector.frames > 0

    @property
    def one_stands_beside(self) -> bool:
        """Whether the connector takes the first of two towers and the fusion the second."""
        return isinstance(self.fusion, SideAttention)

    @property
    def tower(self) -> Encoder:
        """Its one encoder. Raises ValueError where it has several."""
        if not isinstance(self.encoder, Encoder):
            raise ValueError(f"the model has {len(self.encoder.towers)} encoders; ask `encoder.towers` for them")
        return self.encoder

    @property
    def words(self) -> Words:
        lm = self.lm
        return Words(
            tokenizer=lm.text_codec,
            chat=lm.chat,
            bos=lm.bos,
            eos=lm.eos,
            vocabulary=lm.arch.vocab_size,
            longest=lm.arch.context,
        )

    @property
    def reads(self) -> tuple[str, ...]:
        if self.weights is not None:
            return (self.weights,)
        named = [*(tower.weights for tower in self.encoder.towers), self.lm.weights]
        return tuple(name for name in named if name)

    @property
    def learns(self) -> tuple[str, ...]:
        found = ("next_token", "two_vocabularies", "dpo")
        return (*found, "retrieval_token") if isinstance(self.connector, FirstFeature) else found

    @property
    def heads(self) -> tuple[int, int]:
        return self.lm.arch.heads, self.lm.arch.kv_heads

    def layout(self, tiling: Tiling) -> VisionLayout:
        """The numbers that the pipeline needs. Raises ValueError when tiling and model do not fit."""
        self._joins(tiling)
        if tiling.join == "slices":
            patch = getattr(self.encoder.towers[0].arch, "patch", None)
            if patch != getattr(tiling, "patch", None):
                raise ValueError(
                    f"tiling cuts patches of {getattr(tiling, 'patch', None)} pixels and the encoder takes {patch}; "
                    "set the tiling's patch to that"
                )
            tokens = self.connector.tokens((tiling.size // tiling.patch) ** 2)  # type: ignore[union-attr]  # Slices has it
        else:
            patches: int | tuple[int, ...] = self.encoder.tokens(tiling.size)
            first = patches[0] if isinstance(patches, tuple) and self.one_stands_beside else patches
            tokens = self.connector.tokens(first)  # type: ignore[arg-type]  # both fit, see above
        return VisionLayout(
            shape=tiling.shape,
            tokens_per_tile=self.fusion.positions(tokens),
            join=tiling.join,
            separators=self.join.separators,
            together=self.reads_videos,
            around=isinstance(self.fusion, CrossAttention) and self.fusion.around,
        )

    def _joins(self, tiling: Tiling) -> None:
        if isinstance(tiling, Objects):
            raise ValueError("tiling 'objects' gives regions, and this model's towers look at pixels; take resize, say")
        if tiling.join != self.join.kind:
            raise ValueError(
                f"tiling {tiling.kind!r} needs features joined as {tiling.join!r}, and this model joins {self.join.kind!r}; "
                "change model.join or the tiling"
            )
        if getattr(tiling, "scales", (1,)) != self.join.scales:
            raise ValueError(
                f"tiling {tiling.kind!r} has scales {getattr(tiling, 'scales', (1,))} and the model joins {self.join.scales}; "
                "set model.join.scales to them"
            )
        if self.join.kind == "slices" and any(tower.drop_path for tower in self.encoder.towers):
            raise ValueError("encoder.drop_path is by whole tiles, and this tiling cuts slices; set it to 0")
        if self.join.kind == "slices" and not isinstance(self.connector, CrossPool):
            raise ValueError(
                f"slices have shapes of their own, and connector {self.connector.kind!r} takes square tiles; take cross_pool"
            )
        if self.fusion.sees_pictures and tiling.join != "tiles":
            raise ValueError(
                f"fusion {self.fusion.kind!r} tells pictures apart by their tiles, and tiling {tiling.kind!r} joins them as "
                f"{tiling.join!r}; take resize, pad or dynamic_tiles"
            )

    def build(self, folder: Folder = str) -> VisionLanguageModel:
        """The module, float32, on the current default device; `folder` finds the weights that the parts name."""
        if self.weights is None:
            return VisionLanguageModel(self, folder)
        model = self.bare().build()
        read_into(model, self, folder(self.weights))
        return model

    def meta(self) -> VisionLanguageModel:
        """The module without memory: shapes alone, nothing is read."""
        with torch.device("meta"):
            return self.bare().build()

    def bare(self) -> VLM:
        """The same without what must be read: no weights, no tokenizer."""
        lm = replace(self.lm, weights=None, tokenizer=self.lm.text_codec)
        return replace(self, encoder=self.encoder.bare(), connector=bare(self.connector), lm=lm, weights=None)


class VisionLanguageModel(Model):
    """`model(batch)` -> hidden states float (T, D); the objective turns them into a loss."""

    def __init__(self, spec: VLM, folder: Folder) -> None:
        super().__init__()
        self.encoder = spec.encoder.build(folder)
        self.lm = spec.lm.build(folder)
        width = spec.fusion.width(_one(spec.encoder.width), self.lm.width)
        self.connector = spec.connector.build(_widened(spec), width)  # type: ignore[arg-type]  # as the spec says
        read_weights(spec.connector, self.connector, folder)
        self.fusion = _fusion(spec, width)
        self.fusion.attach(self.lm)
        # What a module is must be asked before it is wrapped to be sharded or computed again.
        self.reads_instructions = isinstance(self.connector, InstructedQuerying)
        self.retrieves = isinstance(self.connector, Mappings)
        self.one_stands_beside = spec.one_stands_beside
        self.reads_videos = spec.reads_videos
        if isinstance(spec.fusion, InLMSampler):
            self.connector.shows_cells = True  # type: ignore[assignment]  # an Aggregator's word
        self.border = nn.Flatten(0, 1)  # a module, so that whoever measures can hook on where vision ends
        self.join = Joined(spec.join, self.lm.width)
        self.feature_width = spec.encoder.width
        self._found: list[tuple[Batch, Tensor]] | None = None

    @property
    def tower(self) -> VisionEncoder:
        """Its one encoder. Raises ValueError where it has several."""
        if not isinstance(self.encoder, VisionEncoder):
            raise ValueError(f"the model has {len(self.encoder.encoders)} encoders; ask `encoder.encoders` for them")
        return self.encoder

    def forward(self, batch: Batch) -> Float[Tensor, "T D"]:
        visual, beside = self._seen(batch)
        text = self.lm.embed(self.fusion.words(batch.input_ids))
        return self.fusion(self.lm, text, visual, batch, *([beside] if beside else []))

    def visual(self, batch: Batch) -> Float[Tensor, "V D"]:
        """The batch's visual tokens in the order of their positions; without pictures some that mean nothing, of a blank tile."""
        return self._seen(batch)[0]

    def _seen(self, batch: Batch) -> tuple[Float[Tensor, "V D"], tuple[Tensor, ...]]:
        """Visual tokens, and what a fusion looks at beside them, if it does."""
        cuts = [] if self.join.trivial else cuts_of(batch.cuts.tolist(), batch.tiles.shape[1:])
        share = batch.share
        tokens, *beside = self._tokens(batch, cuts)
        visual = self.border(tokens)
        if share is not None and self.join.spec.kind != "scales":  # each rank has seen some of the tiles
            visual = share.context.gather(visual)
        if not self.join.trivial:
            visual = self.join(visual, tokens.shape[1], cuts)
        return visual if share is None else visual[share.visual], tuple(beside)

    def _tokens(self, batch: Batch, cuts: list[Cut]) -> tuple[Tensor, ...]:
        """The connector's tokens (N, P, D) of the tiles that are here, and what stands beside them."""
        share = batch.share
        match self.join.spec.kind:
            case "slices":
                if share is not None:
                    raise ValueError(
                        "ranks share this pack, and a slice's patches must stay together; set parallel.context to 1, or take a "
                        "tiling of square tiles"
                    )
                grids = slice_grids(cuts)
                return (self.connector(self.encoder(batch.tiles, grids), grids),)
            case "scales":
                features = self.features(batch)
                if share is not None:  # the connector needs all of a picture's scales: each rank does all pictures
                    features = share.context.gather(features.flatten(0, 1)).unflatten(0, (-1, features.shape[1]))
                return (self.connector(with_scales(features, self.join.spec.scales)),)
            case _ if self.reads_videos:
                if share is not None:
                    raise ValueError(
                        "ranks share this pack, and a video's frames must stay together; set parallel.context to 1, or the "
                        "perceiver's frames to 0"
                    )
                features = self.features(batch)
                return (self.connector(features, frames_of(batch, len(features))),)
            case _ if (reading := self.instructed) is not None:
                features = self.features(batch)
                return (reading(features, asked_of_tiles(batch, len(features))),)
            case _:
                features = self.features(batch)
                if self.one_stands_beside:
                    return self.connector(features[0]), *features[1:]
                found = self.connector(features)
                return found if isinstance(found, tuple) else (found,)

    @property
    def instructed(self) -> Any:
        """The connector, where it is one that reads the instruction, whatever it is wrapped in."""
        return self.connector if self.reads_instructions else None

    @contextmanager
    def once(self) -> Iterator[None]:
        """Within it a batch's pictures are seen once, however many objectives ask."""
        self._found = []
        try:
            yield
        finally:
            self._found = None

    def features(self, batch: Batch) -> Float[Tensor, "N P Dv"]:
        """The encoder's features: computed here, or by an annotator in the pipeline, where it is frozen."""
        if batch.features is not None:
            return batch.features.to(next(self.connector.parameters()).dtype)
        for of, found in self._found or []:
            if of is batch:
                return found
        features = self.encoder(batch.tiles, seeds=self._seeds(batch))
        if self._found is not None:
            self._found.append((batch, features))
        return features

    def _seeds(self, batch: Batch) -> Int[Tensor, " N"] | None:
        """Seeds of tiles for a tower that leaves branches out; none where a batch is only counted, and has none itself."""
        if not self.encoder.drops or batch.seeds is None:
            return None
        if batch.share is not None:
            raise ValueError(
                "ranks share this pack, and encoder.drop_path is by pictures, which lie apart; set one of them to none"
            )
        return tile_seeds(batch)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that `Stage.tune` uses, from the coarse to the exact.

        `encoder` leaves out the layers above the one that is read: nothing could ever train them.
        """
        idle = {id(p) for module in self.encoder.unused() for p in module.parameters()}
        fusion = self.fusion.parts(self.lm)
        attached = {id(p) for p in fusion.get("fusion", [])}

        def own(module: nn.Module) -> list[nn.Parameter]:
            return [p for p in module.parameters() if id(p) not in attached]

        return {
            "encoder": [p for p in self.encoder.parameters() if id(p) not in idle],
            "connector": [*self.connector.parameters(), *self.join.parameters()],
            **fusion,
            "lm": own(self.lm),
            "lm.embeddings": own(self.lm.embedding),
            "lm.layers": own(self.lm.layers),
            "lm.head": own(self.lm.model.lm_head),
        }

    def main(self) -> dict[str, list[nn.Parameter]]:
        attached = {id(p) for p in self.parts().get("fusion", [])}
        lm = [p for p in self.lm.parameters() if id(p) not in attached]
        fusion = [p for p in self.parameters() if id(p) in attached]
        own = {
            "encoder": list(self.encoder.parameters()),
            "connector": [*self.connector.parameters(), *self.join.parameters()],
        }
        return own | ({"fusion": fusion} if fusion else {}) | {"lm": lm}

    def attend_by(self, backend: Backend | None) -> None:
        self.lm.backend = backend

    def next_logits(self, batch: Batch) -> Float[Tensor, "S C"]:
        last = self(batch)[batch.cu_seqlens[1:].long() - 1]
        return last @ self.lm.head.to(last.dtype).T

    def units(self) -> list[nn.Module]:
        """Modules to be sharded (and recomputed) one by one."""
        connector: Any = self.connector
        between = connector.units() if hasattr(connector, "units") else [connector]
        return [*self.encoder.units(), *between, *self.fusion.units(), *self.lm.units()]


def _one(width: int | tuple[int, ...]) -> int:
    """Width of one tower's features, the first's of several."""
    return width if isinstance(width, int) else width[0]


def _fusion(spec: VLM, width: int) -> Any:
    """The fusion's module; those that look beside the visual tokens are told what they will see there."""
    match spec.fusion:
        case InLMSampler():
            assert isinstance(spec.connector, SVA)  # as the spec says
            return spec.fusion.build(spec.lm, width, spec.connector)
        case SideAttention():
            return spec.fusion.build(spec.lm, width, spec.encoder.towers[1].width)
        case _:
            return spec.fusion.build(spec.lm, width)


def _widened(spec: VLM) -> int | tuple[int, ...]:
    """Width of what the connector gets: the encoder's, once for each scale."""
    width = spec.encoder.towers[0].width if spec.one_stands_beside else spec.encoder.width
    return width * len(spec.join.scales) if isinstance(width, int) else width
