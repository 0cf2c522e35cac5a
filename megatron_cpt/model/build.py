"""Architecture facts and a run's config -> this rank's part of Megatron-Core's GPTModel.

Nothing about a model is typed by hand: sizes, rope base and scaling, norm eps, biases and tied embeddings all
come from its config.json by way of `Architecture`. The models come back without values: `load_hf` sets them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cpt.architecture.facts import Architecture, YarnRopeScaling
from megatron_cpt.config.loss_chunk import loss_chunk_tokens
from megatron_cpt.config.problems import raise_problems
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.batch import sliding_window_problems
from megatron_cpt.model.chunked_loss import chunked_loss
from megatron_cpt.model.gpu_options import fp8_settings
from megatron_cpt.model.spec import AdaptLayer, LayerModules, layer_spec, resolve_attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class CptModel(GPTModel):
    """GPTModel whose padding rows of the vocabulary take no part in the softmax.

    The vocabulary is padded so that it divides by the TP size. Left in, the padding rows would take probability
    away from real tokens, by an amount that depends on the layout.
    """

    true_vocab_size: int
    loss_chunk_tokens: int | None = None  # whose logits exist at once where a loss is asked for; None: all

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As GPTModel's, which the output layer and the loss are part of."""
        if self.loss_chunk_tokens is None or labels is None or not self.post_process:
            result: Tensor = super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
            return result
        tied = self.share_embeddings_and_output_weights
        return chunked_loss(
            hidden_states,
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels,
            self._loss_of_hidden,
            chunk_tokens=self.loss_chunk_tokens,
            spans=self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1,
        )

    def _loss_of_hidden(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits, _ = self.output_layer(hidden, weight=weight)
        return self.compute_language_model_loss(labels, logits)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, padded vocabulary / TP], overwritten -> loss per token [b, s], fp32."""
        rows = logits.shape[-1]
        real = self.true_vocab_size - parallel_state.get_tensor_model_parallel_rank() * rows
        if real < rows:
            with torch.no_grad():  # the softmax of -inf is 0, and so is its gradient: nothing to record
                logits[..., max(real, 0) :].fill_(float("-inf"))
        return super().compute_language_model_loss(labels, logits)


def transformer_config(config: RunConfig, arch: Architecture) -> TransformerConfig:
    """Megatron-Core's config of the transformer, for this layout and precision."""
    parallel, dtype = config.parallel, DTYPES[config.precision.dtype]
    engine_config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=config.model.dropout,
        attention_dropout=config.model.dropout,
        # Not perform_initialization=False: that leaves out the marks by which TP shards count in the gradient norm.
        init_method=_leave,
        output_layer_init_method=_leave,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=_vpp(config),
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.uses_sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Each token weighs the same, whichever micro batch, data-parallel or context-parallel rank it falls to.
        calculate_per_token_loss=True,
        bias_activation_fusion=True,  # on a CPU `runtime.cpu_kernels.swiglu`
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=True,
        # Frees what was sent to the next stage. NCCL keeps what it still sends alive; gloo does not.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        **fp8_settings(config),
        **_recompute(config),
        **_interleaving(config),
    )
    vars(engine_config).update(_yarn(arch))
    return engine_config


def _yarn(arch: Architecture) -> dict[str, Any]:
    """What GPTModel and the attention look for beside the fields of Megatron-Core's config."""
    scaling = arch.rope_scaling
    if not isinstance(scaling, YarnRopeScaling):
        return {}
    stretch = 0.1 * math.log(scaling.factor)  # Megatron-Core multiplies cosines and sines by 1 + mscale * stretch
    return {
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_mscale": (scaling.attention_factor - 1) / stretch if stretch else 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": scaling.truncate,
    }


def _leave(weight: Tensor) -> Tensor:
    """Initialise nothing: the weights are set, each element once, by `load_hf` or `load_megatron`."""
    return weight


def _recompute(config: RunConfig) -> dict[str, Any]:
    match config.recompute.granularity:
        case "full":  # every layer keeps only its input
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        case "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(config.recompute.modules)}
    return {}


def _vpp(config: RunConfig) -> int | None:
    vpp = config.parallel.vpp
    return vpp if vpp is not None and vpp > 1 else None


def _interleaving(config: RunConfig) -> dict[str, Any]:
    """Megatron-Core 0.16's interleaved schedule gives wrong gradients at PP2 without the overlapped exchange."""
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False} if _vpp(config) else {}


def build_model(
    config: RunConfig, arch: Architecture, modules: LayerModules | None = None, adapt: AdaptLayer | None = None
) -> list[GPTModel]:
    """This rank's model: one GPTModel per virtual pipeline chunk, on its device, weights not yet set.

    `modules` are the classes of a layer, by default those of `model.attention`; `adapt` puts adapters into its
    linears. Needs `init_runtime` before. Raises ConfigError for what the model's config asks for and this layout lacks.
    """
    raise_problems(list(sliding_window_problems(config.batch.seq_length, arch)), "the model's config")
    engine_config = transformer_config(config, arch)
    if (vpp := _vpp(config)) is None:
        return [_build_chunk(config, arch, engine_config, modules, adapt, None)]
    return [_build_chunk(config, arch, engine_config, modules, adapt, stage) for stage in range(vpp)]


def _build_chunk(
    config: RunConfig,
    arch: Architecture,
    engine_config: TransformerConfig,
    modules: LayerModules | None,
    adapt: AdaptLayer | None,
    vp_stage: int | None,
) -> GPTModel:
    where: dict[str, Any] = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
    attention = modules or resolve_attention(config.model.attention, adapters=adapt is not None)
    model = CptModel(
        config=engine_config,
        transformer_layer_spec=layer_spec(
            engine_config,
            attention,
            document_attention=config.model.document_attention,
            vp_stage=vp_stage,
            adapt=adapt,
        ),
        vocab_size=arch.padded_vocab_size(config.parallel.tp),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
        position_embedding_type="yarn" if isinstance(arch.rope_scaling, YarnRopeScaling) else "rope",
        rotary_base=arch.rope_theta,
        vp_stage=vp_stage,
    )
    model.true_vocab_size = arch.vocab_size
    model.loss_chunk_tokens = loss_chunk_tokens(config, arch)
    scaling = arch.rope_scaling
    if isinstance(scaling, YarnRopeScaling):  # tables over the original positions, which only MLA's kernels read
        del model.rotary_pos_emb.cos_cached, model.rotary_pos_emb.sin_cached
    elif scaling is not None:  # Megatron-Core's own switch knows the factor only
        model.rotary_pos_emb.inv_freq = model.rotary_pos_emb._apply_scaling(
            model.rotary_pos_emb.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )
    return model if not torch.cuda.is_available() else model.cuda()
