"""Logits straight from a checkpoint of any format, with less than one layer in memory.

Every weight is read in blocks of rows, multiplied in fp32 and dropped; so a 72B model is evaluated on a small
host. A plain causal forward pass in torch, written from the architecture's facts and compared in the tests
with `transformers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from checkpoint_convert.checkpoint import IndexedCheckpoint, StoredTensor
from checkpoint_convert.rows import Files, read_tensor
from megatron_cpt.architecture.facts import Architecture, YarnRopeScaling
from megatron_cpt.errors import ConversionError

BLOCK_BYTES = 64 * 2**20


def _blocks(files: Files, tensor: StoredTensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first row, one past the last, rows in fp32); blocks do not depend on the stored dtype."""
    step = max(1, BLOCK_BYTES // (4 * tensor.columns))
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        rows = torch.from_numpy(read_tensor(files, tensor, start, stop)).view(getattr(torch, tensor.dtype))
        yield start, stop, rows.float()


@dataclass
class StreamedModel:
    """A model whose weights stay on disk. Tensors: b batch, s sequence, h hidden, n heads, d head_dim."""

    checkpoint: IndexedCheckpoint
    files: Files

    def vector(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.weights.tensors[name]
        return torch.cat([rows for _, _, rows in _blocks(self.files, tensor)]).flatten() + int(tensor.less_one)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        tensor = self.checkpoint.weights.tensors[f"{name}.weight"]
        out = x.new_empty(*x.shape[:-1], tensor.rows)
        for start, stop, rows in _blocks(self.files, tensor):
            out[..., start:stop] = x @ rows.T
        has_bias = f"{name}.bias" in self.checkpoint.weights.tensors
        return out + self.vector(f"{name}.bias") if has_bias else out

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (b, s) -> (b, s, h); only the rows of these tokens are read."""
        tensor = self.checkpoint.weights.tensors["model.embed_tokens.weight"]
        unique, inverse = torch.unique(tokens, return_inverse=True)
        rows = [read_tensor(self.files, tensor, int(i), int(i) + 1) for i in unique]
        table = torch.cat([torch.from_numpy(row).view(getattr(torch, tensor.dtype)) for row in rows])
        return table.float()[inverse]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        eps = self.checkpoint.arch.rms_norm_eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.vector(f"{name}.weight")

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (b, s) -> the final norm's output (b, s, h)."""
        arch = self.checkpoint.arch
        seq_length = tokens.shape[1]
        if arch.sliding_window is not None and seq_length > arch.sliding_window:
            raise ConversionError(
                f"the text has {seq_length} tokens, above the sliding window of {arch.sliding_window}"
            )
        angles = torch.outer(torch.arange(seq_length).float(), inverse_frequencies(arch))
        rotation = torch.cat([angles, angles], dim=-1)
        rotation = torch.stack([rotation.cos(), rotation.sin()]) * attention_factor(arch)
        x = self.embed(tokens)
        for i in range(arch.num_layers):
            layer = f"model.layers.{i}"
            x = x + self._attention(layer, self.norm(f"{layer}.input_layernorm", x), rotation)
            y = self.norm(f"{layer}.post_attention_layernorm", x)
            gate = F.silu(self.linear(f"{layer}.mlp.gate_proj", y))
            x = x + self.linear(f"{layer}.mlp.down_proj", gate * self.linear(f"{layer}.mlp.up_proj", y))
        return self.norm("model.norm", x)

    def _attention(self, layer: str, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        arch = self.checkpoint.arch
        name = f"{layer}.self_attn"

        def heads(which: str) -> torch.Tensor:
            y = self.linear(f"{name}.{which}_proj", x)
            y = y.view(*y.shape[:2], -1, arch.head_dim)
            if arch.qk_norm and which in "qk":
                y = self.norm(f"{name}.{which}_norm", y)
            return y.transpose(1, 2)  # (b, n, s, d)

        q, k = (_rotate(heads(which), rotation) for which in "qk")
        out = F.scaled_dot_product_attention(q, k, heads("v"), is_causal=True, enable_gqa=True)
        return self.linear(f"{name}.o_proj", out.transpose(1, 2).flatten(2))

    def logit_blocks(self, hidden: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first token id, one past the last, logits (b, s, ids)) over the vocabulary."""
        tied = self.checkpoint.arch.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        for start, stop, rows in _blocks(self.files, self.checkpoint.weights.tensors[name]):
            yield start, stop, hidden @ rows.T

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (b, s) -> logits (b, s, vocab), for small vocabularies and tests."""
        return torch.cat([block for _, _, block in self.logit_blocks(self.hidden(tokens))], dim=-1)


def attention_factor(arch: Architecture) -> float:
    """What YaRN multiplies cosines and sines by."""
    return arch.rope_scaling.attention_factor if isinstance(arch.rope_scaling, YarnRopeScaling) else 1.0


def inverse_frequencies(arch: Architecture) -> torch.Tensor:
    """(head_dim / 2,) rotary frequencies; with the `llama3` or YaRN scaling where the config asks for it."""
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
    frequencies = 1.0 / (arch.rope_theta**exponents)
    scaling = arch.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, YarnRopeScaling):
        return _yarn_frequencies(frequencies, scaling, arch)
    context = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    long, short = context / scaling.low_freq_factor, context / scaling.high_freq_factor
    stretched = torch.where(wavelengths > long, frequencies / scaling.factor, frequencies)
    return torch.where((wavelengths <= long) & (wavelengths >= short), blended, stretched)


def _yarn_frequencies(frequencies: torch.Tensor, scaling: YarnRopeScaling, arch: Architecture) -> torch.Tensor:
    """Stretched in full from the dimension on that turns `beta_slow` times over the original positions."""

    def dimension(turns: float) -> float:
        ratio = math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
        return arch.head_dim * ratio / (2 * math.log(arch.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, arch.head_dim - 1)
    width = (high - low) or 0.001
    stretched = ((torch.arange(len(frequencies)).float() - low) / width).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (b, n, s, d), halves rotated against each other as Hugging Face stores them."""
    first, second = x.chunk(2, dim=-1)
    cosines, sines = rotation.unbind()
    rotated: torch.Tensor = x * cosines + torch.cat([-second, first], dim=-1) * sines
    return rotated
