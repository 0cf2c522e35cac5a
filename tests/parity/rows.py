"""The parity tables, as data: what must equal what, within which bound, and what must not.

A training row runs 20 optimizer steps from the same weights on the same samples as the baseline of its model
(one process, TP1 PP1 CP1 DP1) and compares the loss and the gradient norm of every step. `sabotage` names a
mistake of `sabotage.py` that is made on purpose: such a row must leave the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STEPS = 20
LOSS_BOUND = 1e-6  # absolute, fp32
GRAD_NORM_BOUND = 1e-5  # relative, fp32


@dataclass(frozen=True)
class TrainRow:
    name: str
    ranks: int
    overrides: dict[str, Any] = field(default_factory=dict)
    model: str = "base"
    baseline: str = ""  # name of another row; default: the model's own on one rank
    loss_bound: float = LOSS_BOUND
    grad_norm_bound: float = GRAD_NORM_BOUND
    sabotage: str | None = None
    documents: bool = False  # whether the samples carry document ids
    term_weight: float = 0.0  # of a second cross entropy, a loss term; 0: without it
    l2sp: float = 0.0  # strength of the penalty on the distance from another model's weights
    ewc: float = 0.0  # strength of EWC; the Fisher values are estimated by the row itself
    kl: dict[str, Any] | None = None  # forgetting.kl; the sources are named "0" and "1"
    kl_reference: str = "reference"  # a model; with offline_top_k its targets are stored first
    bucket_elements: int | None = None


def parallel(**values: Any) -> dict[str, Any]:
    return {f"parallel.{key}": value for key, value in values.items()}


BF16 = {"precision.dtype": "bf16"}
BASE_PRECISION = {"precision.dtype": "fp32"}
PLAIN_OPTIMIZER = parallel(distributed_optimizer=False)
SINGLES = {"batch.micro_batch_size": 1}
SDPA = {"model.attention": "sdpa"}
DROPOUT = {"model.dropout": 0.1}
DOCUMENTS = {"model.document_attention": True}
SELECTIVE = {"recompute.granularity": "selective", "recompute.modules": ["core_attn", "mlp"]}
NO_DECAY = {"optimizer.weight_decay": 0.0}
ABF = {"theta": 5e6, "max_position_embeddings": 1024}
YARN = {"yarn_factor": 4.0, "original_max_position_embeddings": 64}
CHUNKED_LOSS = {"recompute.loss_chunk_tokens": 24}  # of 64 tokens of a micro batch: the last chunk is smaller
FORWARD_KL = {"weight": 1.5}
REVERSE_KL = {"weight": 2.0, "direction": "reverse", "temperature": 2.0, "sources": ("1",)}
EWC = 2000.0  # with it the pull is about as strong as the gradient
OFFLINE_KL = {"weight": 1.5, "offline_top_k": 16}
OVERLAP = parallel(overlap_grad_reduce=True, overlap_param_gather=True)

# fmt: off
TRAIN_ROWS: tuple[TrainRow, ...] = (
    # baselines
    TrainRow("base", 1),
    TrainRow("base_tied", 1, model="base_tied"),
    TrainRow("deep", 1, SINGLES, model="deep"),
    TrainRow("odd_vocab", 1, model="odd_vocab"),
    TrainRow("nine_heads", 1, model="nine_heads"),
    TrainRow("base_yarn", 1, model="base_yarn"),
    TrainRow("base_bf16", 1, BF16, loss_bound=1e-2, grad_norm_bound=5e-2),
    TrainRow("base_documents", 1, DOCUMENTS, baseline="base_documents", documents=True),
    # one rank, another way of computing the same
    TrainRow("plain_optimizer", 1, PLAIN_OPTIMIZER),
    TrainRow("overlap_alone", 1, OVERLAP, bucket_elements=5000),
    TrainRow("sdpa", 1, SDPA),
    TrainRow("unfused", 1, {"model.attention": "unfused"}),
    TrainRow("accumulation_4", 1, SINGLES),
    TrainRow("accumulation_1", 1, {"batch.micro_batch_size": 4}),
    TrainRow("recompute_full", 1, {"recompute.granularity": "full"}),
    TrainRow("chunked_loss", 1, CHUNKED_LOSS),
    TrainRow("chunked_loss_tied", 1, CHUNKED_LOSS | {"recompute.granularity": "full"}, model="base_tied"),
    TrainRow("chunked_loss_bf16", 1, CHUNKED_LOSS | BF16, baseline="base_bf16", loss_bound=1e-2, grad_norm_bound=5e-2),
    TrainRow("recompute_mlp", 1, {"recompute.granularity": "selective"}),
    TrainRow("recompute_attention", 1, SELECTIVE),
    TrainRow(
        "documents_unfused", 1, {"model.document_attention": True, "model.attention": "unfused"},
        baseline="base_documents", documents=True,
    ),
    TrainRow("documents_sdpa", 1, DOCUMENTS | SDPA, baseline="base_documents", documents=True),
    TrainRow("dropout", 1, DROPOUT, baseline="dropout"),
    TrainRow("dropout_again", 1, DROPOUT, baseline="dropout", loss_bound=0.0, grad_norm_bound=0.0),
    TrainRow("dropout_recompute", 1, DROPOUT | {"recompute.granularity": "full"}, baseline="dropout"),
    # a loss term and a penalty; `test_terms.py` compares these two with transformers
    TrainRow("term", 1, NO_DECAY, term_weight=0.5),
    TrainRow("l2sp", 1, NO_DECAY, l2sp=0.05),
    TrainRow("ewc", 1, NO_DECAY, ewc=EWC),
    TrainRow("ewc_tied", 1, NO_DECAY, model="base_tied", ewc=EWC),
    TrainRow("term_without_weight", 1, term_weight=1e-30),
    # KL to another, frozen model; `test_kl.py` compares the first two with transformers
    TrainRow("kl", 1, NO_DECAY, kl=FORWARD_KL),
    TrainRow("kl_reverse", 1, NO_DECAY, kl=REVERSE_KL),
    TrainRow("kl_tied", 1, NO_DECAY, model="base_tied", kl=FORWARD_KL, kl_reference="reference_tied"),
    TrainRow("kl_odd_vocab", 1, NO_DECAY, model="odd_vocab", kl=FORWARD_KL, kl_reference="reference_odd_vocab"),
    TrainRow("kl_to_itself", 1, NO_DECAY, baseline="kl_to_itself", kl=FORWARD_KL, kl_reference="base"),
    TrainRow("kl_offline", 1, NO_DECAY, kl=OFFLINE_KL),
    TrainRow("kl_offline_reverse", 1, NO_DECAY, kl=REVERSE_KL | {"offline_top_k": 24}),
    TrainRow("kl_offline_whole", 1, NO_DECAY, baseline="kl_offline_whole", kl=FORWARD_KL | {"offline_top_k": 512}),
    TrainRow("kl_without_weight", 1, kl={"weight": 1e-30}, kl_reference="base"),
    # two ranks
    TrainRow("tp2", 2, parallel(tp=2, sequence_parallel=False)),
    TrainRow("tp2_sp", 2, parallel(tp=2)),
    TrainRow("tp2_sp_unfused", 2, parallel(tp=2) | {"model.attention": "unfused"}),
    TrainRow("pp2", 2, parallel(pp=2)),
    TrainRow("pp2_vpp2", 2, parallel(pp=2, vpp=2) | SINGLES),
    TrainRow("pp2_uneven", 2, parallel(pp=2, last_stage_layers=1)),
    TrainRow("tied_pp2_uneven", 2, parallel(pp=2, first_stage_layers=1), model="base_tied"),
    TrainRow("pp2_vpp2_uneven", 2, parallel(pp=2, vpp=2, last_stage_layers=2) | SINGLES, model="deep"),
    TrainRow("cp2", 2, parallel(cp=2)),
    TrainRow("cp2_sdpa", 2, parallel(cp=2) | SDPA),
    TrainRow("dp2", 2, PLAIN_OPTIMIZER),
    TrainRow("dp2_distributed_optimizer", 2),
    TrainRow("dp2_overlap", 2, OVERLAP, bucket_elements=5000),
    TrainRow("tied_pp2", 2, parallel(pp=2), model="base_tied"),
    TrainRow("tied_pp2_vpp2", 2, parallel(pp=2, vpp=2), model="base_tied"),
    TrainRow("tied_tp2_sp", 2, parallel(tp=2), model="base_tied"),
    TrainRow("odd_vocab_tp2", 2, parallel(tp=2), model="odd_vocab"),
    TrainRow("nine_heads_pp2", 2, parallel(pp=2), model="nine_heads"),
    TrainRow("tp2_recompute_full", 2, parallel(tp=2) | {"recompute.granularity": "full"}),
    TrainRow("pp2_recompute_attention", 2, parallel(pp=2) | SELECTIVE),
    TrainRow(
        "documents_cp2", 2, parallel(cp=2) | DOCUMENTS,
        baseline="base_documents", documents=True,
    ),
    TrainRow(
        "documents_pp2", 2, parallel(pp=2) | DOCUMENTS,
        baseline="base_documents", documents=True,
    ),
    TrainRow("tp2_bf16", 2, parallel(tp=2) | BF16, baseline="base_bf16", loss_bound=2e-2, grad_norm_bound=5e-2),
    TrainRow("pp2_bf16", 2, parallel(pp=2) | BF16, baseline="base_bf16", loss_bound=2e-2, grad_norm_bound=5e-2),
    TrainRow("term_tp2", 2, parallel(tp=2) | NO_DECAY, baseline="term", term_weight=0.5),
    TrainRow("term_pp2", 2, parallel(pp=2) | NO_DECAY, baseline="term", term_weight=0.5),
    TrainRow("term_cp2", 2, parallel(cp=2) | NO_DECAY, baseline="term", term_weight=0.5),
    TrainRow("term_dp2", 2, NO_DECAY, baseline="term", term_weight=0.5),
    TrainRow("l2sp_tp2", 2, parallel(tp=2) | NO_DECAY, baseline="l2sp", l2sp=0.05),
    TrainRow("l2sp_pp2", 2, parallel(pp=2) | NO_DECAY, baseline="l2sp", l2sp=0.05),
    TrainRow("l2sp_cp2", 2, parallel(cp=2) | NO_DECAY, baseline="l2sp", l2sp=0.05),
    TrainRow("l2sp_dp2", 2, NO_DECAY, baseline="l2sp", l2sp=0.05),
    *(
        TrainRow(f"ewc_{layout}", 2, overrides | NO_DECAY, baseline="ewc", ewc=EWC)
        for layout, overrides in (
            ("tp2", parallel(tp=2)), ("pp2", parallel(pp=2)), ("cp2", parallel(cp=2)), ("dp2", {}),
            ("pp2_vpp2", parallel(pp=2, vpp=2) | SINGLES),
        )
    ),
    TrainRow("ewc_tied_pp2", 2, parallel(pp=2) | NO_DECAY, model="base_tied", baseline="ewc_tied", ewc=EWC),
    TrainRow("l2sp_dp2_plain_optimizer", 2, PLAIN_OPTIMIZER | NO_DECAY, baseline="l2sp", l2sp=0.05),
    *(
        TrainRow(f"{name}_{layout}", 2, overrides | NO_DECAY, baseline=name, kl=kl)
        for name, kl in (("kl", FORWARD_KL), ("kl_reverse", REVERSE_KL))
        for layout, overrides in (
            ("tp2", parallel(tp=2)), ("pp2", parallel(pp=2)), ("cp2", parallel(cp=2)), ("dp2", {}),
            ("pp2_vpp2", parallel(pp=2, vpp=2) | SINGLES),
        )
    ),
    *(
        TrainRow(f"kl_offline_{layout}", 2, overrides | NO_DECAY, baseline="kl_offline", kl=OFFLINE_KL)
        for layout, overrides in (
            ("tp2", parallel(tp=2)), ("pp2", parallel(pp=2)), ("cp2", parallel(cp=2)), ("dp2", {}),
        )
    ),
    TrainRow(
        "kl_offline_reverse_tp2", 2, parallel(tp=2) | NO_DECAY, baseline="kl_offline_reverse",
        kl=REVERSE_KL | {"offline_top_k": 24},
    ),
    TrainRow(
        "kl_tied_pp2", 2, parallel(pp=2) | NO_DECAY, model="base_tied", baseline="kl_tied", kl=FORWARD_KL,
        kl_reference="reference_tied",
    ),
    TrainRow(
        "kl_odd_vocab_tp2", 2, parallel(tp=2) | NO_DECAY, model="odd_vocab", baseline="kl_odd_vocab", kl=FORWARD_KL,
        kl_reference="reference_odd_vocab",
    ),
    TrainRow("chunked_loss_tp2", 2, parallel(tp=2, sequence_parallel=False) | CHUNKED_LOSS),
    TrainRow("chunked_loss_odd_vocab_tp2_sp", 2, parallel(tp=2) | CHUNKED_LOSS, model="odd_vocab"),
    TrainRow("chunked_loss_tied_pp2_vpp2", 2, parallel(pp=2, vpp=2) | CHUNKED_LOSS, model="base_tied"),
    TrainRow("chunked_loss_dp2_overlap", 2, OVERLAP | CHUNKED_LOSS, bucket_elements=5000),
    # three ranks: SmolLM2's nine heads
    TrainRow("nine_heads_tp3", 3, parallel(tp=3, sequence_parallel=False), model="nine_heads"),
    # four ranks
    TrainRow("tp2_pp2_sp", 4, parallel(tp=2, pp=2)),
    TrainRow("tied_tp2_pp2", 4, parallel(tp=2, pp=2), model="base_tied"),
    TrainRow("pp4_vpp2", 4, parallel(pp=4, vpp=2) | SINGLES, model="deep"),
    TrainRow(
        "pp4_uneven", 4, parallel(pp=4, first_stage_layers=3, last_stage_layers=1) | SINGLES, model="deep",
    ),
    TrainRow("chunked_loss_cp2_tp2_sp", 4, parallel(cp=2, tp=2) | CHUNKED_LOSS),
    TrainRow("cp2_tp2_sp", 4, parallel(cp=2, tp=2)),
    TrainRow("dp2_tp2_overlap", 4, parallel(tp=2) | OVERLAP, bucket_elements=5000),
    TrainRow("dp2_pp2_vpp2_overlap", 4, parallel(pp=2, vpp=2) | OVERLAP | SINGLES, bucket_elements=5000),
    TrainRow("kl_tp2_pp2", 4, parallel(tp=2, pp=2) | NO_DECAY, baseline="kl", kl=FORWARD_KL),
    TrainRow("kl_tp2_cp2", 4, parallel(tp=2, cp=2) | NO_DECAY, baseline="kl", kl=FORWARD_KL),
    TrainRow("kl_reverse_tp2_cp2", 4, parallel(tp=2, cp=2) | NO_DECAY, baseline="kl_reverse", kl=REVERSE_KL),
    TrainRow("ewc_tp2_pp2", 4, parallel(tp=2, pp=2) | NO_DECAY, baseline="ewc", ewc=EWC),
    TrainRow("yarn_cp2_tp2_sp", 4, parallel(cp=2, tp=2), model="base_yarn"),
    # eight ranks: everything at once
    TrainRow("dp2_tp2_pp2", 8, parallel(tp=2, pp=2) | SINGLES),
    # negative controls
    TrainRow("sabotage_chunked_loss", 2, parallel(tp=2) | CHUNKED_LOSS, sabotage="chunks_of_another_order"),
    TrainRow("sabotage_padding", 2, parallel(tp=2), model="odd_vocab", sabotage="unmasked_padding"),
    TrainRow("sabotage_dropout", 1, DROPOUT | {"seed": 4321}, baseline="dropout", sabotage="another_seed"),
    TrainRow("sabotage_micro_batch_mean", 1, sabotage="mean_per_micro_batch"),
    TrainRow("sabotage_norm_gradients", 2, parallel(tp=2), sabotage="norms_not_reduced"),
    TrainRow("sabotage_interleaving", 2, parallel(pp=2, vpp=2) | SINGLES, sabotage="interleaving_without_overlap"),
    TrainRow("sabotage_uneven", 2, parallel(pp=2, last_stage_layers=1), sabotage="layers_counted_evenly"),
    TrainRow("sabotage_tied", 2, parallel(pp=2), model="base_tied", sabotage="tied_gradients_not_reduced"),
    TrainRow("sabotage_cp_order", 2, parallel(cp=2), sabotage="keys_in_rank_order"),
    TrainRow(
        "sabotage_term", 2, parallel(cp=2) | NO_DECAY,
        baseline="term", term_weight=0.5, sabotage="term_tensors_cut_in_halves",
    ),
    TrainRow(
        "sabotage_l2sp", 2, NO_DECAY, baseline="l2sp", l2sp=0.05, sabotage="penalty_of_every_data_parallel_rank",
    ),
    TrainRow("sabotage_ewc", 1, NO_DECAY, baseline="ewc", ewc=EWC, sabotage="fisher_of_batches"),
    TrainRow("sabotage_kl", 2, parallel(tp=2) | NO_DECAY, baseline="kl", kl=FORWARD_KL, sabotage="kl_of_own_rows"),
    TrainRow(
        "sabotage_kl_offline", 2, parallel(tp=2) | NO_DECAY, baseline="kl_offline", kl=OFFLINE_KL,
        sabotage="targets_of_own_rows",
    ),
    TrainRow(
        "sabotage_kl_order", 2, parallel(pp=2) | NO_DECAY,
        baseline="kl", kl=FORWARD_KL, sabotage="reference_of_another_micro_batch",
    ),
    TrainRow(
        "sabotage_kl_sources", 2, NO_DECAY, baseline="kl_reverse", kl=REVERSE_KL, sabotage="kl_of_every_source",
    ),
    TrainRow(
        "sabotage_kl_padding", 2, parallel(tp=2) | NO_DECAY, model="odd_vocab",
        baseline="kl_odd_vocab", kl=FORWARD_KL, kl_reference="reference_odd_vocab", sabotage="kl_of_padding",
    ),
    TrainRow(
        "sabotage_documents", 1, baseline="base_documents", sabotage="whole_sequence_attention",
    ),
)
# fmt: on


@dataclass(frozen=True)
class LogitsRow:
    """Logits against transformers on the same weights, fp32."""

    model: str
    ranks: int
    overrides: dict[str, Any] = field(default_factory=dict)
    bound: float = 1e-5
    sabotage: str | None = None
    rope: dict[str, Any] | None = None  # model.rope; transformers reads the config.json that it gives

    @property
    def name(self) -> str:
        layout = "_".join(f"{key.removeprefix('parallel.')}{value}" for key, value in self.overrides.items())
        rope = None if self.rope is None else "_".join(f"{key}{value}" for key, value in self.rope.items())
        return "-".join(filter(None, ["logits", self.model, layout or "single", rope, self.sabotage]))


FAMILY_MODELS = (
    "qwen2", "qwen2_tied", "qwen3", "qwen3_tied", "llama2", "llama_tied", "llama3_rope", "qwen2_yarn",
    "llama_tied_yarn", "mistral", "mistral_tied", "odd_vocab",
)  # fmt: skip

LOGITS_ROWS: tuple[LogitsRow, ...] = (
    *(LogitsRow(model, 1) for model in (*FAMILY_MODELS, "nine_heads")),
    *(LogitsRow(model, 2, parallel(tp=2)) for model in FAMILY_MODELS),
    *(LogitsRow(model, 4, parallel(tp=2, pp=2)) for model in FAMILY_MODELS),
    LogitsRow("nine_heads", 2, parallel(pp=2)),
    LogitsRow("qwen3_tied", 2, parallel(pp=2, last_stage_layers=1)),
    LogitsRow("llama2", 4, parallel(pp=4, first_stage_layers=1, last_stage_layers=1)),
    LogitsRow("qwen2", 1, sabotage="qkv_not_interleaved"),
    LogitsRow("qwen2", 1, sabotage="gate_and_up_swapped"),
    LogitsRow("qwen2", 1, sabotage="wrong_rope_base"),
    LogitsRow("llama3_rope", 1, sabotage="no_rope_scaling"),
    LogitsRow("qwen2_yarn", 1, sabotage="no_rope_scaling"),
    LogitsRow("llama_tied_yarn", 1, sabotage="yarn_without_attention_factor"),
    LogitsRow("qwen2", 1, rope=ABF),
    LogitsRow("qwen3", 1, rope=YARN),
    LogitsRow("llama3_rope", 1, rope=ABF),
    LogitsRow("qwen2", 1, rope=ABF, sabotage="wrong_rope_base"),
)
