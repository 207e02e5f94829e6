"""BLIP and BLIP-2's first stage in the folders of `transformers`: read from there, written as there.

BLIP has two classes, of which each knows a part: `captioner/` for `BlipForConditionalGeneration`, `retriever/` for
`BlipForImageTextRetrieval`. BLIP-2's first stage has `retriever/` for `Blip2ForImageTextRetrieval`, which lacks the words' head.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from mllm.aligned.bert import BLIP, text_config
from mllm.aligned.querying import QFormerPairs
from mllm.folders.processors import copy_tokenizer, write_blip_pictures
from pipelines.encode import TextCodec

if TYPE_CHECKING:
    from mllm.aligned.model import Aligned, Aligner

DECODER = "text_decoder.bert."
ENCODER = "text_encoder."


def _of_blip(name: str) -> Iterator[str]:
    """What transformers calls the weight that we call `name`, in each class that has it; the decoder's attention last."""
    part, _, rest = name.partition(".")
    if part == "encoder":
        yield f"vision_model.{rest.removeprefix('tower.tower.')}"
        return
    part, _, rest = rest.partition(".")
    match part:
        case "embeddings":
            yield from (f"{ENCODER}embeddings.{rest}", f"{DECODER}embeddings.{rest}")
        case "layers":
            number, _, inner = rest.partition(".")
            if inner.startswith("decoder_attention."):
                yield f"{DECODER}encoder.layer.{number}.{inner.removeprefix('decoder_')}"
                return
            yield f"{ENCODER}encoder.layer.{number}.{inner}"
            if not inner.startswith("attention."):
                yield f"{DECODER}encoder.layer.{number}.{inner}"
        case "words":
            yield f"text_decoder.cls.predictions.{rest}"
        case "match":
            yield f"itm_head.{rest}"
        case _:
            yield f"{part}.{rest}"


def _of_blip2(name: str) -> Iterator[str]:
    part, _, rest = name.partition(".")
    if part == "encoder":
        yield f"vision_model.{rest.removeprefix('tower.tower.')}"
    elif not rest.startswith("words."):
        yield rest


def _names(spec: Aligned, name: str) -> list[str]:
    if name == "temperature":
        return []
    return list(_of_blip(name) if isinstance(spec.arch, BLIP) else _of_blip2(name))


def read(model: Aligner, spec: Aligned, folder: str) -> None:
    """Take weights from a folder (or hub id) of either class of the kind, or of both; what it has not stays as it is drawn.

    A decoder's self-attention that is not there begins as the encoder's, and the other way round. Raises ValueError where the
    folder has none of the layers, or some in another shape.
    """
    found = dict(_stored(folder))
    own = dict(model.named_parameters())
    taken: dict[str, Tensor] = {}
    for name, parameter in own.items():
        here = [theirs for theirs in _names(spec, name) if theirs in found]
        if here:
            taken[name] = found[here[0]]
            if taken[name].shape != parameter.shape:
                raise ValueError(
                    f"weights {folder!r} have {here[0]} of shape {tuple(taken[name].shape)} and the recipe's arch says "
                    f"{tuple(parameter.shape)}; mend the arch"
                )
    if not any(".attention." in name and name.startswith("net.") for name in [*taken, *_twins(taken)]):
        raise ValueError(
            f"weights {folder!r} hold no layers of {spec.arch.kind!r}; name a folder of transformers' class"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            value = taken.get(name, taken.get(_other(name)))
            if value is not None:
                parameter.copy_(value)


def _other(name: str) -> str:
    """The name of the same in the other self-attention."""
    if ".decoder_attention." in name:
        return name.replace(".decoder_attention.", ".attention.")
    return name.replace(".attention.", ".decoder_attention.")


def _twins(taken: dict[str, Tensor]) -> list[str]:
    return [_other(name) for name in taken if ".decoder_attention." in name]


def _stored(folder: str) -> Iterator[tuple[str, Tensor]]:
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(folder, allow_patterns=["*.safetensors", "*/*.safetensors"])
    place = Path(folder)
    inside = [place / name for name in ("captioner", "retriever") if (place / name).is_dir()]
    for file in sorted(file for one in (inside or [place]) for file in one.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- it is no dict
                yield name, tensors.get_tensor(name)


def write(model: Aligner, spec: Aligned, tokenizer: str, out: Path) -> None:
    """Write the folders of transformers' classes below `out`; nothing for kinds that transformers does not know."""
    codec = TextCodec(tokenizer, spec.bos, spec.eos)
    for name, theirs in _classes(spec, codec.special(spec.eos)).items():
        state: dict[str, Any] = {}
        for ours, value in model.named_parameters():
            state |= dict.fromkeys(_names(spec, ours), value.detach())
        own = theirs.state_dict()
        tables = [ours for ours in own if ours.endswith("predictions.decoder.weight")]
        for ours in tables:
            state[ours] = state[f"{DECODER}embeddings.word_embeddings.weight"]
            state[ours.replace("weight", "bias")] = state["text_decoder.cls.predictions.bias"]
        theirs.load_state_dict({name: state[name] for name in own}, strict=True, assign=True)
        theirs.tie_weights()
        theirs.save_pretrained(out / name)
        copy_tokenizer(tokenizer, out / name)
        write_blip_pictures(out / name, spec.side, spec.encoder)


def _classes(spec: Aligned, last: int) -> dict[str, Any]:
    """transformers' modules by folder, without memory; `last` is the id that ends a text."""
    from transformers import (
        Blip2Config,
        Blip2ForImageTextRetrieval,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipForImageTextRetrieval,
    )

    arch, tower = spec.arch, cast("Any", spec.encoder.arch)  # a vision transformer of its kind
    if isinstance(arch, BLIP):
        text = text_config(arch.text, arch.vocab_size, arch.positions, spec.encoder.width, crosses=True).to_dict()
        text |= {"bos_token_id": arch.dec, "eos_token_id": last, "sep_token_id": last, "pad_token_id": 0}
        config = BlipConfig(text_config=text, vision_config=tower.config().to_dict(), image_text_hidden_size=arch.width)
        with torch.device("meta"):
            return {
                "captioner": BlipForConditionalGeneration(config),
                "retriever": BlipForImageTextRetrieval(config),
            }
    if isinstance(arch, QFormerPairs):
        former = arch.config(spec.encoder.width).to_dict()
        config = Blip2Config(
            vision_config=tower.config().to_dict(),
            qformer_config=former,
            num_query_tokens=arch.connector.queries,
            image_text_hidden_size=arch.width,
        )
        with torch.device("meta"):
            return {"retriever": Blip2ForImageTextRetrieval(config)}
    return {}
