"""Shapes of language models: what transformers needs to build one without a download.

An architecture has `vocab_size`, `hidden_size`, `layers`, `heads`, `kv_heads` and `context`; `config` makes the configuration
of transformers, `family` names the class that it builds and `tiny` is the same structure in a toy's size. To add one: such a
spec, and its name in `TextArch`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from mllm.rope import RopeScaling, rope_parameters
from pipelines.types import spec


@spec
class Decoder:
    """What shapes of decoders with rotary positions have in common; those that differ say so.

    `init_std` is the deviation of weights that are trained from scratch.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context: int = 4096
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    init_std: float = 0.02
    rope_scaling: RopeScaling | None = None

    def tiny(self, vocab_size: int = 512) -> Self:
        """The same structure in a toy's size."""
        return replace(self, **_tiny(self, vocab_size), intermediate_size=96)


@spec
class Llama(Decoder):
    """The shape of a Llama-family decoder (arXiv:2302.13971): RMSNorm, rotary positions, SwiGLU, grouped queries.

    Vicuna, Yi and InternLM2 are of this shape too.
    """

    family: ClassVar[str] = "LlamaForCausalLM"
    kind: Literal["llama"] = "llama"

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(**_common(self), rms_norm_eps=self.norm_eps)


@spec
class Qwen2(Decoder):
    """Qwen1.5 and Qwen2 (arXiv:2407.10671): Llama's shape with a bias on queries, keys and values."""

    family: ClassVar[str] = "Qwen2ForCausalLM"
    kind: Literal["qwen2"] = "qwen2"
    context: int = 32_768
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import Qwen2Config

        return Qwen2Config(**_common(self), rms_norm_eps=self.norm_eps, use_sliding_window=False)


@spec
class Phi3(Decoder):
    """Phi-3 (arXiv:2404.14219): Llama's shape with queries, keys and values in one matrix, and gate and up in another."""

    family: ClassVar[str] = "Phi3ForCausalLM"
    kind: Literal["phi3"] = "phi3"

    def config(self) -> Any:
        """transformers' configuration, all of a document in view."""
        from transformers import Phi3Config

        ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return Phi3Config(
            **_common(self),
            **ids,
            rms_norm_eps=self.norm_eps,
            sliding_window=None,
            original_max_position_embeddings=self.context,
        )


@spec
class Mistral(Decoder):
    """Mistral (arXiv:2310.06825), all of a document in view: as published within the 4,096 positions of v0.1's window."""

    family: ClassVar[str] = "MistralForCausalLM"
    kind: Literal["mistral"] = "mistral"

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import MistralConfig

        return MistralConfig(**_common(self), rms_norm_eps=self.norm_eps, sliding_window=None)


@spec
class Gemma(Decoder):
    """Gemma (arXiv:2403.08295): GeGLU, heads of a width of their own, tied embeddings that enter times sqrt(`hidden_size`)."""

    family: ClassVar[str] = "GemmaForCausalLM"
    kind: Literal["gemma"] = "gemma"
    head_size: int
    context: int = 8192
    norm_eps: float = 1e-6
    tied: bool = True

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import GemmaConfig

        return GemmaConfig(
            **_common(self, self.head_size),
            head_dim=self.head_size,
            rms_norm_eps=self.norm_eps,
            hidden_act="gelu_pytorch_tanh",
            pad_token_id=None,
        )

    def tiny(self, vocab_size: int = 512) -> Self:
        """The same structure in a toy's size."""
        return replace(self, **_tiny(self, vocab_size), head_size=32, intermediate_size=96)


@spec
class MiniCPM(Decoder):
    """MiniCPM (arXiv:2404.06395, 3): Llama's shape with the scalings of muP, which transformers has as Granite.

    Embeddings enter times `scale_embeddings`, each layer's branches times `scale_depth` / sqrt(`layers`), and hidden states
    leave divided by `hidden_size` / `base_width`.
    """

    family: ClassVar[str] = "GraniteForCausalLM"
    kind: Literal["minicpm"] = "minicpm"
    tied: bool = True
    init_std: float = 0.1
    scale_embeddings: float = 12.0
    scale_depth: float = 1.4
    base_width: int = 256

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import GraniteConfig

        return GraniteConfig(
            **_common(self),
            rms_norm_eps=self.norm_eps,
            embedding_multiplier=self.scale_embeddings,
            residual_multiplier=self.scale_depth / self.layers**0.5,
            logits_scaling=self.hidden_size / self.base_width,
            attention_multiplier=(self.hidden_size // self.heads) ** -0.5,
        )

    def tiny(self, vocab_size: int = 512) -> Self:
        """The same structure in a toy's size."""
        return replace(self, **_tiny(self, vocab_size), intermediate_size=96, base_width=16)


@spec
class OPT:
    """OPT (arXiv:2205.01068): learned positions, which begin anew with every document, LayerNorm and ReLU. Not its 350M."""

    family: ClassVar[str] = "OPTForCausalLM"
    kind: Literal["opt"] = "opt"
    vocab_size: int = 50_272
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    context: int = 2048
    tied: bool = True
    init_std: float = 0.02

    @property
    def kv_heads(self) -> int:
        """Each head has keys and values of its own."""
        return self.heads

    def config(self) -> Any:
        """transformers' configuration; without dropout, as in all of this project's training."""
        from transformers import OPTConfig

        return OPTConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            word_embed_proj_dim=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            ffn_dim=self.intermediate_size,
            max_position_embeddings=self.context,
            dropout=0.0,
            attention_dropout=0.0,
            tie_word_embeddings=self.tied,
            init_std=self.init_std,
            pad_token_id=None,
            use_cache=False,
        )

    def tiny(self, vocab_size: int = 512) -> OPT:
        """The same structure in a toy's size."""
        small = {"hidden_size": 64, "layers": 2, "heads": 4, "context": min(self.context, 1024)}
        return replace(self, vocab_size=vocab_size, intermediate_size=96, **small)


@spec
class GLM(Decoder):
    """GLM-4 (arXiv:2406.12793, 2.1): Llama's shape with biases of queries, keys and values, and half of each head turned.

    Neighbouring channels turn together. Its layers have gate and up in one matrix.
    """

    family: ClassVar[str] = "GlmForCausalLM"
    kind: Literal["glm"] = "glm"
    head_size: int = 128
    context: int = 8192
    norm_eps: float = 1.5625e-7
    turned: Annotated[float, Field(gt=0, le=1)] = 0.5

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import GlmConfig

        words = _common(self, self.head_size)
        words["rope_parameters"] = {**words["rope_parameters"], "partial_rotary_factor": self.turned}
        return GlmConfig(
            **words, head_dim=self.head_size, rms_norm_eps=self.norm_eps, attention_bias=True, pad_token_id=None
        )

    def tiny(self, vocab_size: int = 512) -> GLM:
        """The same structure in a toy's size."""
        return replace(self, **_tiny(self, vocab_size), head_size=16, intermediate_size=96)


@spec
class GPTNeoX:
    """GPT-NeoX (arXiv:2204.06745) and RedPajama-INCITE: LayerNorm, biases, rotary positions, GELU.

    `turned` is the share of each head that is turned. With `parallel` attention and feed-forward stand beside each other.
    """

    family: ClassVar[str] = "GPTNeoXForCausalLM"
    kind: Literal["gpt_neox"] = "gpt_neox"
    vocab_size: int = 50_432
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    context: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    init_std: float = 0.02
    turned: Annotated[float, Field(gt=0, le=1)] = 1.0
    parallel: bool = False
    bias: bool = True
    rope_scaling: RopeScaling | None = None

    @property
    def kv_heads(self) -> int:
        """Each head has keys and values of its own."""
        return self.heads

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import GPTNeoXConfig

        words = _common(self)
        del words["num_key_value_heads"]
        words["rope_parameters"] = {**words["rope_parameters"], "partial_rotary_factor": self.turned}
        return GPTNeoXConfig(
            **words,
            layer_norm_eps=self.norm_eps,
            use_parallel_residual=self.parallel,
            attention_bias=self.bias,
            bos_token_id=None,
            eos_token_id=None,
        )

    def tiny(self, vocab_size: int = 512) -> GPTNeoX:
        """The same structure in a toy's size."""
        small = {"hidden_size": 64, "layers": 2, "heads": 4, "context": min(self.context, 1024)}
        return replace(self, vocab_size=vocab_size, intermediate_size=96, **small)


@spec
class MPT:
    """MPT (MosaicML, 2023): ALiBi (arXiv:2108.12409) in place of positions, LayerNorm without biases, GELU, tied embeddings."""

    family: ClassVar[str] = "MptForCausalLM"
    kind: Literal["mpt"] = "mpt"
    vocab_size: int = 50_432
    hidden_size: int
    layers: int
    heads: int
    context: int = 2048
    norm_eps: float = 1e-5
    tied: bool = True
    init_std: float = 0.02

    @property
    def kv_heads(self) -> int:
        """Each head has keys and values of its own."""
        return self.heads

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size

    def config(self) -> Any:
        """transformers' configuration."""
        from transformers import MptConfig

        return MptConfig(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            n_layers=self.layers,
            n_heads=self.heads,
            max_seq_len=self.context,
            layer_norm_epsilon=self.norm_eps,
            tie_word_embeddings=self.tied,
            initializer_range=self.init_std,
            use_cache=False,
        )

    def tiny(self, vocab_size: int = 512) -> MPT:
        """The same structure in a toy's size."""
        return replace(self, vocab_size=vocab_size, hidden_size=64, layers=2, heads=4, context=min(self.context, 1024))


@spec
class T5:
    """T5 v1.1 and Flan-T5 (arXiv:2210.11416): relative positions, gated GELU, heads of a width of their own, no biases.

    `layers` are those of each stack. Positions have no bound; `context` is what recipes may ask for.
    """

    family: ClassVar[str] = "T5ForConditionalGeneration"
    decoder_only: ClassVar[bool] = False
    kind: Literal["t5"] = "t5"
    vocab_size: int = 32_128
    hidden_size: int
    layers: int
    heads: int
    head_size: int = 64
    intermediate_size: int
    context: int = 2048
    init_factor: Annotated[float, Field(gt=0)] = 1.0

    @property
    def kv_heads(self) -> int:
        """Each head has keys and values of its own."""
        return self.heads

    def config(self) -> Any:
        """transformers' configuration; without dropout, as in all of this project's training."""
        from transformers import T5Config

        v1_1: dict[str, Any] = {"tie_word_embeddings": False, "decoder_start_token_id": 0}
        return T5Config(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            d_kv=self.head_size,
            d_ff=self.intermediate_size,
            num_layers=self.layers,
            num_heads=self.heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            initializer_factor=self.init_factor,
            use_cache=False,
            **v1_1,
        )

    def tiny(self, vocab_size: int = 512) -> T5:
        """The same structure in a toy's size."""
        small = {"hidden_size": 64, "layers": 2, "heads": 4, "head_size": 16, "intermediate_size": 96}
        return replace(self, vocab_size=vocab_size, **small)


TextArch = Annotated[
    Llama | Qwen2 | Mistral | Phi3 | Gemma | MiniCPM | GLM | GPTNeoX | OPT | MPT | T5, Field(discriminator="kind")
]


def _common(arch: Decoder | GPTNeoX, head: int | None = None) -> dict[str, Any]:
    """What the configurations of decoders with rotary positions have in common."""
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "intermediate_size": arch.intermediate_size,
        "max_position_embeddings": arch.context,
        "rope_parameters": rope_parameters(arch.rope_theta, arch.rope_scaling, head or arch.hidden_size // arch.heads),
        "tie_word_embeddings": arch.tied,
        "initializer_range": arch.init_std,
        "use_cache": False,
    }


def _tiny(arch: Decoder, vocab_size: int) -> dict[str, Any]:
    """Two layers of four heads, with as few of keys and values as the full size has in proportion."""
    kv_heads = max(1, 4 * arch.kv_heads // arch.heads)
    small = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": kv_heads}
    return {"vocab_size": vocab_size, "context": min(arch.context, 1024), **small}
