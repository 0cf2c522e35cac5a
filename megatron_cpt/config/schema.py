"""One YAML is one run: the typed, frozen schema. Each field is checked alone here; `derive` checks across.

Every field has a description with its unit; docs/config.md is generated from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from megatron_cpt.budget import Interval, parse_count


def _count(value: Any) -> Any:
    return value if value is None else parse_count(value)


def _interval(value: Any) -> Any:
    return value if value is None else Interval.parse(value)


Tokens = Annotated[int, BeforeValidator(_count), Field(ge=0)]
Every = Annotated[Interval, BeforeValidator(_interval), PlainSerializer(str, return_type=str)]
Positive = Annotated[int, BeforeValidator(_count), Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class ModelConfig(Section):
    """Which model is trained and where its weights come from."""

    init_from: str = Field(
        description="Hugging Face directory, Megatron torch_dist checkpoint, or a run folder to take the first "
        "weights from; the word `random` trains from scratch."
    )
    architecture: str | None = Field(
        None,
        description="Directory or config.json in Hugging Face form that describes the model. Needed when init_from "
        "is `random` or not yet on this machine; default: beside the weights of init_from.",
    )
    allow_instruct: bool = Field(
        False, description="Continue from an Instruct/Chat checkpoint; off, because CPT damages its tuning."
    )
    check_start: bool = Field(
        True,
        description="Before the first step, refuse a loss near ln(vocabulary), that of a uniform guess, and compare it "
        "with transformers' where that is installed and memory allows. Off for weights that are meant to be untrained.",
    )
    attention: Literal["auto", "te", "sdpa", "block_causal", "unfused"] = Field(
        "auto",
        description="Core attention: TransformerEngine, torch SDPA, blocks of matrix products for CPUs, or Megatron's "
        "unfused; auto picks TE on CUDA where installed, SDPA on CUDA else, and block_causal on a CPU.",
    )
    document_attention: bool = Field(False, description="Keep packed documents from attending to each other.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of attention and residuals; large models are trained without."
    )


class BudgetConfig(Section):
    """How many tokens the run sees. Iterations and samples are derived, never typed."""

    train_tokens: Tokens = Field(1_638_400, description="Tokens to train on, counted from the start of the run.")
    warmup_tokens: Tokens = Field(163_840, description="Tokens over which the learning rate rises from 0 to lr.")
    rounding: Literal["up", "exact"] = Field(
        "up",
        description="`up`: a last partial step is made whole, and that is printed; `exact`: a remainder is an error.",
    )


class BatchConfig(Section):
    """What one optimizer step sees."""

    seq_length: Positive = Field(1024, description="Tokens per training sample.")
    micro_batch_size: Positive = Field(1, description="Samples per forward pass of one data-parallel rank.")
    global_batch_size: Positive = Field(32, description="Samples per optimizer step, over all ranks.")
    rampup_from: Positive | None = Field(
        None,
        description="Start with this global batch size and raise it by as much again at equal distances over "
        "rampup_tokens; global_batch_size must be a multiple of it.",
    )
    rampup_tokens: Tokens = Field(0, description="Tokens from the start of the run to the full global batch size.")


class ScheduleConfig(Section):
    """The learning rate as a pure function of consumed tokens."""

    kind: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt", "infinite"] = Field(
        "cosine",
        description="Shape after the warm-up. wsd: warm-up, stable, decay; infinite: warm-up, cool-down, constant, "
        "anneal.",
    )
    decay_tokens: Tokens | None = Field(
        None, description="Tokens of the final decay of `wsd` and `infinite`; default 10 % of train_tokens."
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = Field("linear", description="Shape of the decay of `wsd`.")
    cooldown_tokens: Tokens = Field(0, description="`infinite`: tokens from lr down to constant_lr.")
    constant_lr: float | None = Field(None, gt=0, description="`infinite`: rate between cool-down and anneal.")
    start_tokens: Tokens = Field(
        0,
        description="Token of the run at which this schedule begins. Set it to the tokens consumed so far to "
        "re-warm a continued run: the warm-up then starts there.",
    )
    warmup_from_lr: float = Field(0.0, ge=0, description="Rate at which the warm-up starts.")


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(5e-5, gt=0, description="Peak learning rate.")
    min_lr: float = Field(5e-6, ge=0, description="Learning rate at the end of the schedule.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay; not applied to norms and biases.")
    adam_beta1: float = Field(0.9, gt=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="Decay of the second moment.")
    adam_eps: float = Field(1e-8, gt=0, description="Term added to the denominator.")
    clip_grad: float = Field(1.0, ge=0, description="Global gradient norm is clipped to this; 0 switches it off.")
    cpu_offload_ratio: float = Field(
        0.0, ge=0, le=1, description="Share of the optimizer state kept and updated in host memory; CUDA only."
    )
    moments_dtype: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32", description="Storage of AdamW's moments; below fp32 needs TransformerEngine's optimizer."
    )


class ParallelConfig(Section):
    """How the model is laid out. Data parallelism is what remains: dp = nodes * gpus_per_node / (tp * pp * cp)."""

    nodes: Positive = Field(1, description="Machines of the job.")
    gpus_per_node: Positive = Field(1, description="GPUs per machine; on a CPU host: processes.")
    tp: Positive = Field(1, description="Tensor-parallel ranks; within one node.")
    pp: Positive = Field(1, description="Pipeline stages.")
    vpp: Positive | None = Field(None, description="Virtual pipeline chunks per stage (interleaved schedule).")
    first_stage_layers: Positive | None = Field(
        None, description="Layers of the first pipeline stage; default: an equal share of what the last one leaves."
    )
    last_stage_layers: Positive | None = Field(
        None,
        description="Layers of the last pipeline stage, which also computes the logits and the loss: with fewer layers "
        "it takes as long as the others. Default: an equal share of what the first one leaves.",
    )
    cp: Positive = Field(1, description="Context-parallel ranks that share one sequence.")
    sequence_parallel: bool | None = Field(
        None,
        description="Shard norms and dropout along the sequence within the TP group; default: on when tp > 1.",
    )
    distributed_optimizer: bool = Field(True, description="Shard optimizer state over data-parallel ranks.")
    overlap_grad_reduce: bool = Field(False, description="Overlap the gradient reduction with the backward pass.")
    overlap_param_gather: bool = Field(False, description="Overlap the parameter all-gather with the forward pass.")


class PrecisionConfig(Section):
    """Numbers and memory."""

    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="Weights and activations; master weights and gradient sums are fp32 either way."
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        None, description="fp8 matrix products of TransformerEngine, with per-tensor current scaling; CUDA only."
    )


class RecomputeConfig(Section):
    """Activations that are computed again in the backward pass instead of kept."""

    granularity: Literal["none", "selective", "full"] = Field(
        "none", description="`selective`: the modules below; `full`: whole layers, which keep only their input."
    )
    modules: tuple[Literal["core_attn", "mlp"], ...] = Field(
        ("mlp",),
        min_length=1,
        description="What `selective` recomputes. core_attn saves nothing under flash attention (TE, SDPA).",
    )


class DataSource(Section):
    """One tokenised dataset in the training blend."""

    name: str = Field(description="Name in metrics and ledgers.")
    prefix: str = Field(description="Path of the .bin/.idx pair without the ending.")
    weight: float = Field(1.0, gt=0, description="Share of training tokens, relative to the other sources.")


class DataConfig(Section):
    """What is trained on and what is measured."""

    train: tuple[DataSource, ...] = Field((), description="Sources of the training blend.")
    validation: dict[str, str] = Field(
        default_factory=dict, description="Named held-out sets: name -> prefix; each is evaluated apart."
    )
    max_epochs: float = Field(4.0, gt=0, description="More repeats than this of any source is an error.")
    cache_dir: str | None = Field(None, description="Folder of index caches; default <run_dir>/index_cache.")


class EvalConfig(Section):
    """Perplexity on the validation sets inside the loop."""

    every: Every | None = Field(None, description="Interval; the first and the last step always evaluate.")
    tokens: Positive | None = Field(None, description="Tokens per validation set; default: the whole set.")


class CheckpointConfig(Section):
    """What is kept on disk. The last step always saves."""

    branch_from: str | None = Field(
        None,
        description="Run folder or checkpoint of another run from which this run takes weights, optimizer, data "
        "position and token count when it starts: an anneal off a stable checkpoint, for example.",
    )
    save_every: Every | None = Field(
        Interval(1000, "iters"), validate_default=True, description="Interval between saves."
    )
    keep_last: Positive = Field(2, description="Newest checkpoints kept.")
    keep_every: Positive | None = Field(
        None, description="Also keep, for good, the first checkpoint at or after each multiple of this many tokens."
    )
    best_by: str | None = Field(
        None,
        description="Also keep the checkpoint with the lowest loss on this validation set (checkpoints/best.json).",
    )
    async_save: bool = Field(True, description="Write in the background while training goes on.")
    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = Field(
        "fully_reshardable",
        description="How the distributed optimizer is stored. fully_reshardable loads under any layout, with 12 "
        "bytes per parameter of a model-parallel rank in host memory while it loads; dp_reshardable fixes tp and pp.",
    )


class FailureConfig(Section):
    """What the run does when a step goes wrong, hangs, or the job must end. Exit codes: docs/recover.md."""

    spike_zscore: float | None = Field(
        10.0,
        gt=0,
        description="Skip a step whose loss lies more than this many robust standard deviations above the median of "
        "the last spike_window steps; null accepts any finite loss. NaN and infinity are always skipped.",
    )
    spike_window: Positive = Field(
        128, description="Steps that a loss is compared with; the first 20 are never judged."
    )
    skips_before_rollback: Positive = Field(
        5, description="Steps skipped in a row after which the last good checkpoint is loaded; the data goes on."
    )
    max_rollbacks: int = Field(
        2, ge=0, description="Rollbacks after which the run stops with the do-not-restart exit code."
    )
    wall_time_minutes: float | None = Field(
        None, gt=0, le=1e6, description="Save and stop at the end of the step that reaches this age of the job."
    )
    setup_timeout_minutes: float = Field(60.0, gt=0, le=1e6, description="Longest time from start to the first step.")
    step_timeout_minutes: float = Field(30.0, gt=0, le=1e6, description="Longest time of one step.")
    eval_timeout_minutes: float = Field(120.0, gt=0, le=1e6, description="Longest time of one validation of all sets.")
    save_timeout_minutes: float = Field(60.0, gt=0, le=1e6, description="Longest time that the loop waits for a save.")


class LogConfig(Section):
    """Metrics. `metrics.jsonl` is always written."""

    every: Every = Field(Interval(1, "iters"), validate_default=True, description="Interval between metric lines.")
    tensorboard: bool = Field(False, description="Also write <run_dir>/tensorboard.")
    wandb_project: str | None = Field(None, description="Also log to this Weights & Biases project.")
    wandb_mode: Literal["online", "offline"] = Field(
        "offline", description="`offline` writes below <run_dir>/wandb, for `wandb sync` later."
    )


class RunConfig(Section):
    """One run. Relative paths are relative to the directory the command is started in."""

    job_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run.")
    run_dir: str | None = Field(None, description="Folder of the run; default runs/<job_name>.")
    seed: int = Field(
        1234, ge=0, le=4_000_000_000, description="Seed of data order, dropout and random initialisation."
    )
    model: ModelConfig
    budget: BudgetConfig = BudgetConfig()
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    failure: FailureConfig = FailureConfig()
    log: LogConfig = LogConfig()

    @property
    def folder(self) -> str:
        return self.run_dir or f"runs/{self.job_name}"
