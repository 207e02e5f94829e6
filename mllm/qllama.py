"""QLLaMA: a language model as a connector, whose learned queries look at the encoder's features.

Its layers read text as well in the stages before any other language model, see `mllm.aligned.qllama`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor, nn

from mllm.own import FILE, OwnTower
from pipelines.types import spec

WITHIN = "net.middle."
"""Where an export of pairs (`mllm.aligned.qllama`) has the weights of the connector."""


@spec
class QLLaMA:
    """InternVL's language middleware (arXiv:2312.14238, 3.2): a LLaMA of 7B with `queries`, and attention to the features.

    Queries see each other both ways and stand at the first rotary positions; every `every`-th layer, the first among them, looks
    at the encoder's features between its attention and its feed-forward (`modeling_qllama.py`). Two matrices follow with GELU
    between. `weights` name a folder with a `model.safetensors` under this module's names, or what `internvl_g` was exported to.
    """

    kind: Literal["qllama"] = "qllama"
    queries: int = 96
    hidden_size: int = 4096
    layers: int = 32
    heads: int = 32
    intermediate_size: int = 11_008
    every: int = 2
    norm_eps: float = 1e-6
    weights: str | None = None

    def tokens(self, patches: int) -> int:  # noqa: ARG002 -- as many as there are queries
        """Visual tokens of a tile."""
        return self.queries

    def tiny(self) -> Self:
        return replace(self, queries=4, hidden_size=32, layers=2, heads=4, intermediate_size=64, weights=None)

    def config(self) -> Any:
        """transformers' configuration of the layers; the words of its vocabulary are nothing to a connector."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=1,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            rms_norm_eps=self.norm_eps,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Middleware(self, d_in, d_out)


class Middle(OwnTower):
    """Queries, and the layers that they and texts go through; if nobody `asks`, layers of a LLaMA and no queries."""

    def __init__(self, spec: QLLaMA, d_in: int, asks: bool = True) -> None:
        super().__init__()
        from transformers import LlamaModel

        model: Any = LlamaModel._from_config(spec.config(), attn_implementation="sdpa")
        self.queries = nn.Parameter(torch.randn(spec.queries, spec.hidden_size) * 0.02) if asks else None
        self.layers = nn.ModuleList(
            MiddleLayer(layer, Look(spec, d_in) if asks and number % spec.every == 0 else None)
            for number, layer in enumerate(model.layers)
        )
        self.rotary = model.rotary_emb
        self.norm = model.norm

    def asked(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        """The queries once for each tile. Raises ValueError where there are none."""
        if self.queries is None:
            raise ValueError("this QLLaMA has no queries to ask with; build it with arch.asks")
        return self.queries.to(features.dtype).expand(len(features), -1, -1)

    def run(
        self,
        x: Float[Tensor, "N L D"],
        features: Float[Tensor, "N P Dv"] | None = None,
        queries: int = 0,
        seen: Bool[Tensor, "N 1 L L"] | None = None,
    ) -> Float[Tensor, "N L D"]:
        """Layers and the norm over [queries; text], of which the first `queries` look at `features`.

        `seen` says which positions each one sees; all, if nothing is said. Rotary positions count from the first.
        """
        turn = self.rotary(x, position_ids=torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x = layer(x, features, turn, queries, seen)
        return self.norm(x)

    def units(self) -> list[nn.Module]:
        """Its layers, one by one: together they are as large as a language model."""
        return list(self.layers)


class Middleware(Middle):
    """`QLLaMA`."""

    def __init__(self, spec: QLLaMA, d_in: int, d_out: int) -> None:
        super().__init__(spec, d_in)
        self.project = nn.ModuleList([nn.Linear(spec.hidden_size, d_out), nn.Linear(d_out, d_out)])

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        x = self.asked(features)
        first, second = self.project
        return second(F.gelu(first(self.run(x, features, x.shape[1])))).clone()

    def read(self, folder: str) -> None:
        """Take the weights from `folder`: all of them under this module's names, or an export of `internvl_g`, whose queries and
        layers are taken and whose matrices are left as they are drawn. Raises ValueError where neither is there.
        """
        file = Path(folder) / FILE
        stored = load_file(file) if file.is_file() else {}
        inner = {name.removeprefix(WITHIN): value for name, value in stored.items() if name.startswith(WITHIN)}
        if not inner:
            return super().read(folder)
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("project.")}
        wrong = [name for name, value in own.items() if name not in inner or inner[name].shape != value.shape]
        if wrong:
            raise ValueError(
                f"weights {folder!r} are of another QLLaMA than the recipe's connector: {wrong[:3]} is missing or has another "
                "shape; mend the connector's numbers"
            )
        self.load_state_dict(inner, strict=False)
        return None


class MiddleLayer(nn.Module):
    """A layer of LLaMA that sees both ways, and looks at the features where it has a `look`."""

    def __init__(self, layer: Any, look: nn.Module | None) -> None:
        super().__init__()
        layer.self_attn.is_causal = False
        self.layer = layer
        self.look = look

    def forward(
        self,
        x: Float[Tensor, "N L D"],
        features: Float[Tensor, "N P Dv"] | None,
        turn: tuple[Tensor, Tensor],
        queries: int,
        seen: Bool[Tensor, "N 1 L L"] | None = None,
    ) -> Float[Tensor, "N L D"]:
        layer = self.layer
        attended, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=turn, attention_mask=seen)
        x = x + attended
        if self.look is not None and features is not None:
            asking, rest = x.split([queries, x.shape[1] - queries], dim=1)
            x = torch.cat([asking + self.look(asking, features), rest], dim=1)
        return x + layer.mlp(layer.post_attention_layernorm(x))


class Look(nn.Module):
    """Attention of the queries to the features, both normed before; no biases, no gate."""

    def __init__(self, spec: QLLaMA, d_in: int) -> None:
        super().__init__()
        width = spec.hidden_size
        self.heads = spec.heads
        self.norm_queries = nn.RMSNorm(width, eps=spec.norm_eps)
        self.norm_features = nn.RMSNorm(d_in, eps=spec.norm_eps)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(d_in, width, bias=False)
        self.value = nn.Linear(d_in, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "N Q D"], features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        seen = self.norm_features(features)
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(self.norm_queries(x)), self.key(seen), self.value(seen))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
