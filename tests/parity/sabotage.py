"""Mistakes made on purpose, so that each parity test is shown to notice one. Each is a context manager."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from megatron_cpt.forgetting import fisher, kl, reference, vocab_parallel_kl
from megatron_cpt.model import attention, build, chunked_loss, load_hf, load_origin, spec
from megatron_cpt.train import step


def unmasked_padding() -> Any:
    """Padding rows of the vocabulary take part in the softmax."""
    return mock.patch.object(build.CptModel, "compute_language_model_loss", build.GPTModel.compute_language_model_loss)


def mean_per_micro_batch() -> Any:
    """Each micro batch weighs the same, however many of its tokens count."""
    whole = step._loss

    def loss(batch: Any, *args: Any) -> Any:
        total, tokens, report = whole(batch, *args)
        return total / tokens * 10, torch.ones_like(tokens) * 10, report

    return mock.patch.object(step, "_loss", loss)


@contextlib.contextmanager
def norms_not_reduced() -> Iterator[None]:
    """Under sequence parallelism each TP rank keeps the norm gradient of its own tokens."""
    original = spec.RMSNorm.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    with mock.patch.object(spec.RMSNorm, "__init__", unmarked):
        yield


def interleaving_without_overlap() -> Any:
    """Megatron-Core 0.16's interleaved schedule at PP2 without the overlapped exchange."""
    return mock.patch.object(build, "_interleaving", lambda config: {})


def layers_counted_evenly() -> Any:
    """Weights are loaded as if every pipeline stage held the same number of layers."""
    original = load_hf.global_name

    def global_name(chunk: Any, name: str) -> str:
        stage, stages = parallel_state.get_pipeline_model_parallel_rank(), chunk.config.pipeline_model_parallel_size
        begins = chunk.decoder.layers[0].layer_number - 1
        shift = stage * chunk.config.num_layers // stages - begins
        return re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + shift}", original(chunk, name))

    return mock.patch.object(load_hf, "global_name", global_name)


def tied_gradients_not_reduced() -> Any:
    """First and last pipeline stage each update their own copy of the tied embedding."""
    from megatron.core.distributed import finalize_model_grads as module_function

    module = __import__(module_function.__module__, fromlist=["_"])
    return mock.patch.object(module, "_allreduce_word_embedding_grads", lambda *args: None)


def keys_in_rank_order() -> Any:
    """Context parallelism takes gathered keys in the order of the ranks instead of the sequence."""
    gather = attention.tensor_parallel.gather_from_sequence_parallel_region
    return mock.patch.object(
        attention.SdpaAttention, "_whole_sequence", lambda self, tensor: gather(tensor, group=self.cp_group)
    )


def term_tensors_cut_in_halves() -> Any:
    """Under context parallelism a loss term gets a half of its tensors, not the two chunks of its rank."""
    right = step.on_this_rank

    def wrong(batch: Any, device: Any, cp_rank: int, cp_size: int, axes: Any) -> Any:
        halves = {n: t.chunk(cp_size, axes[n])[cp_rank] for n, t in batch["term_tensors"].items()}
        return right(batch, device, cp_rank, cp_size, axes) | {"term_tensors": halves}

    return mock.patch.object(step, "on_this_rank", wrong)


def penalty_of_every_data_parallel_rank() -> Any:
    """The penalty's gradient is added once for each data-parallel rank, as if it were one of the data."""
    once = step._add_penalties

    def add(state: Any) -> Any:
        return [once(state) for _ in range(parallel_state.get_data_parallel_world_size())][-1]

    return mock.patch.object(step, "_add_penalties", add)


def fisher_of_batches() -> Any:
    """The squares of the gradients of two samples together, as of a batch."""
    right = fisher._add_squares
    calls = itertools.count(1)

    def add(chunks: Any, sums: Any) -> None:
        if next(calls) % 2 == 0:  # else the gradients stay, and the next sample's are added to them
            right(chunks, sums)

    return mock.patch.object(fisher, "_add_squares", add)


def kl_of_own_rows() -> Any:
    """Each tensor-parallel rank normalises over its own rows of the vocabulary."""
    return mock.patch.object(vocab_parallel_kl, "reduced", lambda values, operation, group: values)


def targets_of_own_rows() -> Any:
    """Each tensor-parallel rank takes the stored tokens for rows of its own part of the vocabulary."""
    right = kl.topk_kl
    return mock.patch.object(kl, "topk_kl", lambda *args, **options: right(*args, **options | {"first_row": 0}))


def reference_of_another_micro_batch() -> Any:
    """The reference's hidden states come in the reverse order of the micro batches."""
    right = reference.FrozenReference.hidden_states
    return mock.patch.object(
        reference.FrozenReference, "hidden_states", lambda self, batches: right(self, batches)[::-1]
    )


def kl_of_every_source() -> Any:
    """Tokens of a source that the term leaves out count all the same."""
    return mock.patch.object(kl.KlToBase, "_mask", lambda self, batch: batch["loss_mask"])


def kl_of_padding() -> Any:
    """Padding rows of the vocabulary take part in the divergence."""
    right = kl.vocab_parallel_kl
    return mock.patch.object(
        kl, "vocab_parallel_kl", lambda own, other, **options: right(own, other, **options | {"real_rows": 10**6})
    )


def whole_sequence_attention() -> Any:
    """Packed documents attend to each other. The row leaves the option out; nothing is left to patch."""
    return contextlib.nullcontext()


def another_seed() -> Any:
    """Dropout draws other numbers. The row sets the seed; nothing is left to patch."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def qkv_not_interleaved() -> Iterator[None]:
    """All queries, then all keys, then all values: Hugging Face's order."""
    with _after_loading(_queries_then_keys_then_values):
        yield


@contextlib.contextmanager
def gate_and_up_swapped() -> Iterator[None]:
    with _after_loading(_swap_halves):
        yield


def wrong_rope_base() -> Any:
    return _other_architecture(rope_theta=10_000.0)


def no_rope_scaling() -> Any:
    return _other_architecture(rope_scaling=None)


def yarn_without_attention_factor() -> Any:
    original = build._yarn
    return mock.patch.object(build, "_yarn", lambda arch: original(arch) | {"yarn_mscale": 0.0})


def chunks_of_another_order() -> Any:
    """A chunk of the hidden states meets the labels as if sequence parallelism dealt positions out one by one."""
    return mock.patch.object(
        chunked_loss, "_spans", lambda tensor, spans: tensor.view(len(tensor), -1, spans).transpose(1, 2)
    )


def _other_architecture(**changes: Any) -> Any:
    original = build._build_chunk
    return mock.patch.object(
        build, "_build_chunk", lambda config, arch, *rest: original(config, dataclasses.replace(arch, **changes), *rest)
    )


@contextlib.contextmanager
def _after_loading(change: Any) -> Iterator[None]:
    original = load_origin.load_hf_weights

    def load(chunks: Any, model_dir: Any, arch: Any, in_base: Any) -> None:
        original(chunks, model_dir, arch, in_base)
        with torch.no_grad():
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    change(name, parameter, arch)

    with mock.patch.object(load_origin, "load_hf_weights", load):
        yield


def _queries_then_keys_then_values(name: str, parameter: Any, arch: Any) -> None:
    if "linear_qkv" in name:
        per_group = parameter.view(arch.num_query_groups, -1, arch.head_dim, *parameter.shape[1:])
        q, k, v = per_group[:, :-2], per_group[:, -2:-1], per_group[:, -1:]
        parameter.copy_(torch.cat([part.reshape(-1, *parameter.shape[1:]) for part in (q, k, v)]))


def _swap_halves(name: str, parameter: Any, arch: Any) -> None:
    if name.endswith("linear_fc1.weight"):
        parameter.copy_(torch.cat(parameter.chunk(2)[::-1]))


SABOTAGES = {
    function.__name__: function
    for function in (
        unmasked_padding,
        mean_per_micro_batch,
        norms_not_reduced,
        interleaving_without_overlap,
        layers_counted_evenly,
        tied_gradients_not_reduced,
        keys_in_rank_order,
        term_tensors_cut_in_halves,
        penalty_of_every_data_parallel_rank,
        fisher_of_batches,
        kl_of_own_rows,
        targets_of_own_rows,
        reference_of_another_micro_batch,
        kl_of_every_source,
        kl_of_padding,
        whole_sequence_attention,
        another_seed,
        qkv_not_interleaved,
        gate_and_up_swapped,
        wrong_rope_base,
        no_rope_scaling,
        yarn_without_attention_factor,
        chunks_of_another_order,
    )
}
