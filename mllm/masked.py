"""Models that learn from pictures alone by what is masked in them: MAE and BEiT, `transformers`' own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from mllm.chance import block_masks, noise, seeds_of_tiles, tile_seeds
from mllm.depth import Depth, DropPath, branches_of
from mllm.encoders import Folder
from mllm.layers import TOY, Layers, Patched
from mllm.model import IMAGENET_MEAN, IMAGENET_STD, RGB, Model, PictureModel
from mllm.pairs import shown
from mllm.weights import TOWER_FIELDS, agree, load
from ops.images import normalize
from pipelines.types import Batch, spec


@spec
class MAE(Patched):
    """A masked autoencoder (arXiv:2111.06377): the encoder sees what is not masked, a light decoder gives the pixels of the rest.

    `norm_pix` makes the target of a patch its pixels less their mean, over their deviation (section 4.1).
    """

    kind: Literal["mae"] = "mae"
    encoder: Layers
    decoder: Layers
    patch: int = 16
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    norm_pix: bool = True

    def tiny(self) -> Self:
        return replace(self, encoder=TOY, decoder=replace(TOY, hidden_size=16), patch=8, image=32)

    def build(self, weights: str | None) -> Any:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config = ViTMAEConfig(
            **self.encoder.words(),
            decoder_hidden_size=self.decoder.hidden_size,
            decoder_num_hidden_layers=self.decoder.layers,
            decoder_num_attention_heads=self.decoder.heads,
            decoder_intermediate_size=self.decoder.intermediate_size,
            **self.sizes(),
            mask_ratio=self.ratio,
            norm_pix_loss=self.norm_pix,
        )
        if weights is not None:
            base, auto = ViTMAEForPreTraining, "AutoModelForPreTraining"
            net = load(base, auto, weights, attn_implementation="sdpa", dtype=torch.float32)
            agree(weights, config, net.config, (*TOWER_FIELDS, "decoder_hidden_size", "decoder_num_hidden_layers"))
            return net
        net: Any = ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa")
        for table in (net.vit.embeddings.position_embeddings, net.decoder.decoder_pos_embed):
            table.data.copy_(sines(self.image // self.patch, table.shape[-1]))  # transformers leaves zeros there
        return net


def sines(side: int, width: int) -> Float[Tensor, "1 P D"]:
    """Positions of a CLS token, which are zeros, and of side x side patches, row by row, `width` a multiple of 4.

    Sines and cosines of the column, then of the row, a quarter of the width each (MAE's published code, whose weights have them
    in this order).
    """
    turns = torch.arange(side)[:, None] / 10_000 ** (torch.arange(width // 4) / (width // 4))
    each = torch.cat([turns.sin(), turns.cos()], dim=1)
    patches = torch.cat([each.repeat(side, 1), each.repeat_interleave(side, 0)], dim=1)
    return torch.cat([torch.zeros(1, width), patches])[None]


@spec
class Codebook:
    """A frozen picture tokenizer, Chameleon's VQ encoder: a code for each 16 x 16 pixels.

    `weights` None is a random one, which still gives like patches like codes. `channels` is the width of its first convolution.
    """

    weights: str | None = None
    codes: int = 8192
    channels: int = 128

    def build(self, folder: Folder) -> Any:
        from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
        from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

        if self.weights is None:
            width = 2 * self.channels
            return ChameleonVQVAE(
                ChameleonVQVAEConfig(
                    embed_dim=width, latent_channels=width, num_embeddings=self.codes, base_channels=self.channels
                )
            )
        place = folder(self.weights)
        made: Any = load(ChameleonVQVAE, "AutoModel", place, dtype=torch.float32)
        if made.config.num_embeddings != self.codes:
            raise ValueError(
                f"{place} has a codebook of {made.config.num_embeddings} and the recipe says codes={self.codes}; mend the recipe"
            )
        return made


@spec
class BEiT(Patched):
    """BEiT (arXiv:2106.08254): a ViT with relative positions names the codes of the patches that are masked, block by block.

    `masked` is how many of a picture's patches are, `drop_path` the share of branches left out in the last layer. The codes are a
    frozen tokenizer's (`codebook`), at 16 x 16 pixels a code.
    """

    kind: Literal["beit"] = "beit"
    encoder: Layers
    codebook: Codebook = Codebook()
    patch: Literal[16] = 16
    masked: int = 75
    drop_path: DropPath = 0.0

    def tiny(self) -> Self:
        return replace(self, encoder=TOY, codebook=Codebook(codes=64, channels=32), image=96, masked=14)

    def build(self, weights: str | None) -> Any:
        from transformers import BeitConfig, BeitForMaskedImageModeling

        config = BeitConfig(
            **self.encoder.words(),
            vocab_size=self.codebook.codes,
            **self.sizes(),
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            use_absolute_position_embeddings=False,
            drop_path_rate=0.0,
        )
        if weights is not None:
            base, auto = BeitForMaskedImageModeling, "AutoModelForMaskedImageModeling"
            net = load(base, auto, weights, attn_implementation="sdpa", dtype=torch.float32)
            agree(weights, config, net.config, (*TOWER_FIELDS, "vocab_size"))
            return net
        return BeitForMaskedImageModeling._from_config(config, attn_implementation="sdpa")


@spec
class MaskedImage(PictureModel):
    """A model of masked pictures.

    A mask is a function of the picture's row and epoch, so that neither ranks nor restarts change it.
    """

    kind: Literal["masked_image"] = "masked_image"
    arch: Annotated[MAE | BEiT, Field(discriminator="kind")]
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD

    @property
    def reads(self) -> tuple[str, ...]:
        codebook = self.arch.codebook.weights if isinstance(self.arch, BEiT) else None
        return tuple(name for name in (self.weights, codebook) if name)

    @property
    def learns(self) -> tuple[str, ...]:
        return ("masked_pixels",) if isinstance(self.arch, MAE) else ("masked_codes",)

    def tiny(self) -> Self:
        return replace(self, arch=self.arch.tiny(), weights=None)

    def build(self, folder: Folder = str) -> MaskedAutoencoder | MaskedPredictor:
        weights = folder(self.weights) if self.weights else None
        net = self.arch.build(weights)
        if isinstance(self.arch, MAE):
            return MaskedAutoencoder(self, net)
        return MaskedPredictor(self, self.arch, net, self.arch.codebook.build(folder))

    def bare(self) -> Self:
        arch = self.arch
        if isinstance(arch, BEiT):
            arch = replace(arch, codebook=replace(arch.codebook, weights=None))
        return replace(self, arch=arch, weights=None)


@torch.no_grad()
def codes_of(codebook: Any, tiles: UInt8[Tensor, "N 3 H W"], side: int) -> Int[Tensor, "N P"]:
    """The codes of side x side patches of each tile, by a frozen tokenizer that makes one of 16 x 16 pixels.

    Where a tile has fewer pixels or more the tokenizer looks at it resized, as BEiT's does (arXiv:2106.08254, 2.1).
    """
    pixels = tiles.to(next(codebook.parameters()).dtype) / 127.5 - 1
    if tiles.shape[-1] != 16 * side:
        pixels = F.interpolate(pixels, size=(16 * side, 16 * side), mode="bicubic", antialias=True).clamp(-1, 1)
    return codebook.encode(pixels).image_tokens.reshape(len(tiles), -1)


@dataclass(slots=True)
class Hidden:
    """What is predicted of tiles float (I, P, D), what is there (pixels float (I, P, D), or codes int64 (I, P)), what is masked.

    `documents` int64 (I,) are those that the pictures are of.
    """

    predicted: Float[Tensor, "I P D"]
    target: Tensor
    masked: Bool[Tensor, "I P"]
    documents: Int[Tensor, " I"]


class _Pictures(Model):
    net: Any
    mean: Tensor
    std: Tensor

    def __init__(self, spec: MaskedImage, net: Any) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    def forward(self, batch: Batch) -> Float[Tensor, "I P D"]:
        return self.hidden(batch).predicted

    def hidden(self, batch: Batch) -> Hidden:
        """What is predicted of a batch's pictures, and what is there."""
        raise NotImplementedError

    def _pixels(self, batch: Batch) -> Float[Tensor, "N 3 H W"]:
        return normalize(batch.tiles, self.mean, self.std)


class MaskedAutoencoder(_Pictures):
    """MAE over packs. Its positions are those of sines, which nothing trains."""

    def hidden(self, batch: Batch) -> Hidden:
        embeddings = self.net.vit.embeddings
        pixels = self._pixels(batch)
        drawn = noise(seeds_of_tiles(batch), embeddings.patch_embeddings.num_patches).to(pixels.device)
        x, mask, restore = embeddings(pixels.to(embeddings.cls_token.dtype), noise=drawn)
        for layer in self.net.vit.layers:
            x = layer(x)
        predicted = self.net.decoder(self.net.vit.layernorm(x), restore).logits
        target = self.net.patchify(pixels)
        if self.net.config.norm_pix_loss:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        pictures = shown(batch)
        at = pictures.tiles
        return Hidden(predicted[at], target[at], mask[at].bool(), pictures.documents)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        fixed = {id(self.net.vit.embeddings.position_embeddings), id(self.net.decoder.decoder_pos_embed)}
        return {
            "encoder": [p for p in self.net.vit.parameters() if id(p) not in fixed],
            "decoder": [p for p in self.net.decoder.parameters() if id(p) not in fixed],
        }

    def main(self) -> dict[str, list[nn.Parameter]]:
        return {"encoder": list(self.net.vit.parameters()), "decoder": list(self.net.decoder.parameters())}

    def units(self) -> list[nn.Module]:
        return [*self.net.vit.layers, *self.net.decoder.decoder_layers]


class MaskedPredictor(_Pictures):
    """BEiT over packs, with the frozen tokenizer that says what is right."""

    codebook: Any

    def __init__(self, spec: MaskedImage, arch: BEiT, net: Any, codebook: Any) -> None:
        super().__init__(spec, net)
        self.arch = arch
        self.codebook = codebook
        branches = [branches_of(layer) for layer in net.beit.layers]
        self.depth = Depth(branches, arch.drop_path) if arch.drop_path else None

    def train(self, mode: bool = True) -> MaskedPredictor:
        super().train(mode)
        self.codebook.eval()
        return self

    def hidden(self, batch: Batch) -> Hidden:
        beit = self.net.beit
        pixels = self._pixels(batch).to(beit.embeddings.cls_token.dtype)
        side = self.arch.image // self.arch.patch
        mask = block_masks(seeds_of_tiles(batch), side, self.arch.masked).to(pixels.device)
        codes = codes_of(self.codebook, batch.tiles, side)
        if self.depth is not None:
            self.depth.draw(tile_seeds(batch))
        x = self.net.layernorm(beit(pixels, bool_masked_pos=mask).last_hidden_state)
        pictures = shown(batch)
        at = pictures.tiles
        return Hidden(self.net.lm_head(x[:, 1:])[at], codes[at], mask[at], pictures.documents)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"encoder": list(self.net.parameters())}

    def main(self) -> dict[str, list[nn.Parameter]]:
        return self.parts() | {"codebook": list(self.codebook.parameters())}

    def units(self) -> list[nn.Module]:
        return list(self.net.beit.layers)
