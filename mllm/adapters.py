"""LoRA adapters as peft keeps them, beside the model that they were trained on.

    PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained("export"), "export/adapter")

is the model that was trained, as `merge_adapters` would have made it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm.folders.wholes import form_of, theirs
from mllm.model import Model
from mllm.recipe import Recipe
from mllm.tune import merge_adapters
from mllm.vlm import VLM

ADAPTER = "adapter"
"""The folder within an export that holds them."""

WITHIN = "lm.model."
"""What our names of the language model's modules begin with, where it is a folder of its own."""


@dataclass(slots=True)
class Adapters:
    """Adapters that were taken off a model: each one's tensors, rank and alpha by the module's name in transformers' model."""

    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    alphas: dict[str, int]
    dora: bool

    def write(self, out: Path) -> None:
        """Write them to the folder `out`, as peft reads them."""
        from peft import LoraConfig

        rank, alpha = next(iter(self.ranks.values())), next(iter(self.alphas.values()))
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_dora=self.dora,
            target_modules=list(self.ranks),
            rank_pattern={name: own for name, own in self.ranks.items() if own != rank},
            alpha_pattern={name: own for name, own in self.alphas.items() if own != alpha},
            inference_mode=True,
        ).save_pretrained(str(out))
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in self.tensors.items()},
            out / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )


def take_off(recipe: Recipe, model: Model) -> Adapters:
    """Take the adapters off `model`, which is then what it was before they were trained, but for what was trained fully.

    Raises ValueError where it has none, or has some in a part that peft's format cannot name.
    """
    from peft.tuners.lora.layer import LoraLayer

    found = Adapters({}, {}, {}, dora=False)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            _take(found, _name(recipe, name), module)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    if not found.ranks:
        raise ValueError(
            f"recipe {recipe.name!r}: its last stage trains no LoRA, so there is no adapter; export without --adapter"
        )
    return found


def _take(found: Adapters, name: str, module: Any) -> None:
    if len(module.lora_A) != 1:
        raise ValueError(
            f"{name} has {len(module.lora_A)} adapters on each other; export merged weights, without --adapter"
        )
    (key,) = module.lora_A
    head = f"base_model.model.{name}"
    found.ranks[name], found.alphas[name] = module.r[key], module.lora_alpha[key]
    found.tensors[f"{head}.lora_A.weight"] = module.lora_A[key].weight
    found.tensors[f"{head}.lora_B.weight"] = module.lora_B[key].weight
    if key in module.lora_magnitude_vector:
        found.dora = True
        found.tensors[f"{head}.lora_magnitude_vector"] = module.lora_magnitude_vector[key].weight


def _name(recipe: Recipe, name: str) -> str:
    """What transformers calls the module: within the whole model where it has one, else within the language model's folder."""
    if isinstance(recipe.model, VLM) and form_of(recipe.model):
        return theirs(f"{name}.weight").removesuffix(".weight")
    if not name.startswith(WITHIN):
        raise ValueError(
            f"{name} has an adapter, and is in no model of transformers that the export has as a folder of its own; export "
            "merged weights, without --adapter"
        )
    return name.removeprefix(WITHIN)


def merge_from(folder: Path, recipe: Recipe, model: Model) -> None:
    """Add the adapters that `Adapters.write` left in `folder` to the weights of `model`, which they were taken off.

    Raises ValueError where one belongs to a matrix that the model has not.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config: Any = LoraConfig.from_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    wanted = set(config.target_modules)
    names = {theirs: ours for ours, theirs in _matrices(recipe, model) if theirs in wanted}
    if odd := sorted(wanted - names.keys()):
        raise ValueError(
            f"{folder} has an adapter of {odd[0]}, and the model beside it has no such matrix; export again"
        )
    config.target_modules = list(names.values())
    config.rank_pattern = {names[name]: rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {names[name]: alpha for name, alpha in config.alpha_pattern.items()}
    inject_adapter_in_model(config, model)
    del model.peft_config  # else adapters that are trained next would be warned about
    own = dict(model.named_parameters())
    for key, value in tensors.items():  # peft's file says `lora_A.weight`, and `lora_magnitude_vector` without
        name, _, of = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        own[f"{names[name]}.{of}.default.weight"].data.copy_(value)
    merge_adapters(model)


def _matrices(recipe: Recipe, model: Model) -> Iterator[tuple[str, str]]:
    """The model's matrices, by our name and transformers'; those that no adapter of an export can belong to are left out."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            with suppress(ValueError, KeyError):
                yield name, _name(recipe, name)


def put_on(model: nn.Module, folder: Path) -> Any:
    """A model of transformers with the adapters of `folder`, by peft itself."""
    from peft import PeftModel

    with warnings.catch_warnings():  # peft asks transformers in words that go away with its next version
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, str(folder))
