"""The `args` that Megatron-LM stores beside the weights, as far as an architecture decides them."""

from __future__ import annotations

import argparse
import logging

from checkpoint_convert.checkpoint import MismatchError
from checkpoint_convert.megatron_config import LLAMA3_SCALING, yarn_fields
from megatron_cpt.architecture.facts import Architecture, Llama3RopeScaling, YarnRopeScaling
from megatron_cpt.architecture.tensors import MegatronTensor

log = logging.getLogger(__name__)


def megatron_args(
    arch: Architecture,
    dtypes: dict[str, str],
    tp: int,
    pp: int,
    vpp: int | None,
    iteration: int,
    gammas_less_one: bool = False,
) -> argparse.Namespace:
    """Names of Megatron-LM's command line, so that `--use-checkpoint-args` builds this model."""
    dtype, scaling = next(iter(dtypes.values())), arch.rope_scaling
    args = argparse.Namespace(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        group_query_attention=arch.num_query_groups != arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        max_position_embeddings=arch.max_position_embeddings,
        norm_epsilon=arch.rms_norm_eps,
        normalization="RMSNorm",
        apply_layernorm_1p=gammas_less_one,
        position_embedding_type="yarn" if isinstance(scaling, YarnRopeScaling) else "rope",
        rotary_base=int(arch.rope_theta) if arch.rope_theta.is_integer() else arch.rope_theta,
        rotary_percent=1.0,
        use_rope_scaling=isinstance(scaling, Llama3RopeScaling),
        rope_scaling_factor=scaling.factor if isinstance(scaling, Llama3RopeScaling) else 8.0,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        untie_embeddings_and_output_weights=not arch.tie_word_embeddings,
        vocab_size=arch.vocab_size,
        padded_vocab_size=arch.padded_vocab_size(tp),
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        iteration=iteration,
    )
    if isinstance(scaling, YarnRopeScaling):
        vars(args).update(yarn_fields(scaling))
    elif scaling is not None:
        constants = {name: getattr(scaling, name) for name in LLAMA3_SCALING}
        if constants != LLAMA3_SCALING:  # by names of our own, which the reader knows
            vars(args).update({f"rope_scaling_{name}": value for name, value in constants.items()})
            log.warning("Megatron-LM's --use-rope-scaling has constants %s, this model %s", LLAMA3_SCALING, constants)
    return args


def tensor_dtype(tensor: MegatronTensor, dtypes: dict[str, str]) -> str:
    """dtype of a Megatron tensor; the Hugging Face tensors that it joins must agree."""
    found = {dtypes[name] for name in tensor.hf}
    if len(found) != 1:
        names = ", ".join(f"{name} {dtypes[name]}" for name in tensor.hf)
        raise MismatchError(f"{tensor.megatron} joins tensors of different dtypes: {names}", hint="give --dtype")
    return found.pop()
