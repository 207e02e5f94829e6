"""transformers' models as annotators ask them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mllm.encoders import Encoder
from mllm.weights import UntrustedCode, refusal_by_annotator
from ops import images
from pipelines.tiling import Resize


def chosen_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settle(model: nn.Module, device: torch.device) -> None:
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


def kind_of(folder: str, known: Sequence[str]) -> str:
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


class TwoTowers:
    """Cosine similarity of pictures and texts."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        kind = kind_of(folder, ("clip", "siglip"))
        self.device = chosen_device()
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


class Matcher:
    """How sure BLIP is that a text belongs to a picture: the "yes" of its matching head."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer, BlipForImageTextRetrieval

        self.device = chosen_device()
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


class Captioner:
    """BLIP's captions of pictures."""

    def __init__(self, folder: str, tokens: int) -> None:
        from transformers import AutoTokenizer, BlipForConditionalGeneration

        kind_of(folder, ("blip",))
        self.device = chosen_device()
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


def classifier(folder: str, size: int) -> Callable[[Tensor], tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """uint8 (n, 3, S, S) -> pooled features (n, F) and class probabilities (n, C), by the classifier in `folder`."""
    from transformers import AutoModelForImageClassification

    kind = kind_of(folder, ("resnet", "vit"))
    device = chosen_device()
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


def codebook(folder: str, codes: int) -> Callable[[Tensor], Tensor]:
    """uint8 (n, 3, S, S) -> codes int64 (n, cells), by the VQ encoder in `folder`. Raises ValueError, see `DiscreteCodes`."""
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
    from transformers.models.janus.modeling_janus import JanusVQVAE

    kinds = {"chameleon_vqgan": ChameleonVQVAE, "janus_vqgan": JanusVQVAE, "emu3_vqgan": Emu3VQVAE}
    kind = kind_of(folder, tuple(kinds))
    device = chosen_device()
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
