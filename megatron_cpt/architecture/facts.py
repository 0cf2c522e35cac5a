"""What a dense decoder-only model is, as plain facts read from a Hugging Face config.json.

The families under `megatron_cpt/architecture/families/` fill it; the trainer, the planner and the
converters read it. There are no size tables anywhere: these facts come from the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3RopeScaling:
    """The `llama3` rope scaling of Llama 3.1 and later (wavelengths beyond the old context are stretched)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (Peng et al., arXiv:2309.00071): wavelengths beyond a ramp are stretched by `factor`."""

    factor: float
    original_max_position_embeddings: int  # tokens
    beta_fast: float  # the ramp's ends, in rotations over the original positions
    beta_slow: float
    attention_factor: float  # cosines and sines are multiplied by it
    truncate: bool  # whether the ramp's ends are rounded to whole dimensions


RopeScaling = Llama3RopeScaling | YarnRopeScaling


@dataclass(frozen=True)
class Architecture:
    """A dense decoder with RMSNorm, rotary positions, grouped-query attention and a gated SiLU MLP."""

    family: str  # key of megatron_cpt.architecture.families.FAMILIES
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int  # rows of the embedding, which may exceed the tokenizer's vocabulary
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None  # tokens, None when every layer attends to the whole sequence
    dtype: str  # of the stored weights: "bfloat16", "float16" or "float32"

    @property
    def positions(self) -> int:
        """Tokens that a sequence may have; with YaRN `max_position_embeddings` may not have been raised."""
        scaling = self.rope_scaling
        if not isinstance(scaling, YarnRopeScaling):
            return self.max_position_embeddings
        return max(self.max_position_embeddings, round(scaling.factor * scaling.original_max_position_embeddings))

    @property
    def num_parameters(self) -> int:
        """Unique parameters; a tied output layer counts once, vocabulary padding not at all."""
        h, d = self.hidden_size, self.head_dim
        q_rows, kv_rows = self.num_attention_heads * d, 2 * self.num_query_groups * d
        attention = (q_rows + kv_rows) * h + q_rows * h
        attention += (q_rows + kv_rows) if self.qkv_bias else 0
        attention += 2 * d if self.qk_norm else 0
        layer = attention + 3 * h * self.ffn_hidden_size + 2 * h
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + h

    def padded_vocab_size(self, tp: int, divisible_by: int = 128) -> int:
        """Embedding rows after padding so that each of `tp` ranks holds a multiple of `divisible_by` rows.

        A vocabulary that already divides by `tp` is left alone: padding is only added where it is needed.
        """
        if self.vocab_size % tp == 0:
            return self.vocab_size
        step = divisible_by * tp
        return -(-self.vocab_size // step) * step
