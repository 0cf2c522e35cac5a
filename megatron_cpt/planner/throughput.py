"""Seconds of a step and tokens per second, from a roofline of what a rank computes, moves and sends. No torch.

A micro-batch of T tokens per rank costs a layer, forward:

    matrix products   2 T * (weights of the layer / t)                   at an efficiency of the peak
    attention         2 T s a / t, half of the square (causal)           at an efficiency of the peak
    elementwise       norms, rotation, activation, residual sums         at an efficiency of HBM
    tensor parallel   2 gathers and 2 reductions of 2 T h bytes          at an efficiency of NVLink

and twice that backward, once more forward where it is recomputed, and once more in the frozen reference of
forgetting.kl. The last stage adds the logits and the loss. A
pipeline takes m rounds of its slowest stage and 1 / v of each of the others (Narayanan et al. 2021, arXiv:2104.04473).
Gradients are reduced in fp32 over data-parallel ranks, and the weights gathered; overlapped, one part of several stays
exposed.

The efficiencies are one set of constants per kind of GPU, fitted to published measurements by
benchmarks/planner_accuracy.py, which prints how far the model is off where it was not fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.loss_chunk import chunk_of
from megatron_cpt.planner.hardware import Hardware
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.timeline import StageTimes

_ITEM = 2  # bytes of an activation in bf16
# Nine of ten predictions for sources that were not fitted lie within this share: benchmarks/planner_accuracy.py.
UNCERTAINTY = 0.15
_SCORE_BYTES = 10  # read and written for each score by masked softmax and dropout
_DIVERGENCE_BYTES = 160  # read and written for each logit by forgetting/vocab_parallel_kl.py, counted by operation
_KERNEL_SECONDS = 4e-6  # to start one of the small kernels
_MESSAGE_SECONDS = 15e-6  # to start a transfer between nodes


@dataclass(frozen=True)
class Shape:
    """What of a model its work depends on."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    gated: bool = True  # three matrices in the MLP instead of two

    @classmethod
    def of(cls, arch: Architecture) -> Shape:
        """Return the shape of a model."""
        return cls(
            arch.num_layers,
            arch.hidden_size,
            arch.ffn_hidden_size,
            arch.num_attention_heads,
            arch.num_query_groups,
            arch.head_dim,
            arch.vocab_size,
        )

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's matrices."""
        attention = (2 * self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim
        return self.hidden_size * (attention + (3 if self.gated else 2) * self.ffn_hidden_size)

    @property
    def head_weights(self) -> int:
        """Elements of the output layer."""
        return self.hidden_size * self.vocab_size

    def flops_per_token(self, seq_length: int, *, frozen: bool = False) -> float:
        """Return the operations of one trained token, forward and backward; causal attention, no recomputation.

        `frozen`: the weights get no gradients of their own, as under adapters.
        """
        attention = 2 * seq_length * self.num_attention_heads * self.head_dim
        times = 2.0 if frozen else 3.0
        products = self.num_layers * 2 * self.layer_weights + 2 * self.head_weights
        return times * products + 3.0 * self.num_layers * attention


@dataclass(frozen=True)
class StepSeconds:
    """Where the seconds of one step go, on the rank that takes longest."""

    products: float
    attention: float
    elementwise: float
    tensor_parallel: float
    context_parallel: float
    pipeline_transfer: float
    bubble: float
    data_parallel: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(float(getattr(self, part.name)) for part in fields(self))


@dataclass(frozen=True)
class Throughput:
    """Speed of a layout. MFU counts no recomputation, and causal attention as half of the square."""

    step: StepSeconds
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    mfu: float


@dataclass(frozen=True)
class _Work:
    """Seconds of one micro-batch on one stage, forward and backward, by part."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.elementwise + self.tensor_parallel + self.context_parallel

    def plus(self, other: _Work, times: float = 1.0) -> _Work:
        return _Work(*(getattr(self, part.name) + times * getattr(other, part.name) for part in fields(self)))


def throughput(shape: Shape, layout: Layout, hardware: Hardware) -> Throughput:
    """Predict the speed of a training step of `layout`."""
    step = _step(shape, layout, hardware)
    tokens_per_s = layout.tokens_per_step / step.total
    per_gpu = tokens_per_s / layout.gpus
    peak = hardware.peak_flops[number_format(layout, hardware)]
    flops = shape.flops_per_token(layout.seq_length, frozen=layout.lora_rank is not None)
    return Throughput(step, tokens_per_s, per_gpu, per_gpu * flops / peak)


def stage_seconds(shape: Shape, layout: Layout, hardware: Hardware) -> list[StageTimes]:
    """Return the seconds of one micro-batch on each pipeline stage."""
    forward = 1 / (4.0 if layout.recompute == "full" else 3.0)
    totals = [_stage(shape, layout, hardware, stage).total for stage in range(layout.pp)]
    return [StageTimes(total * forward, total * (1 - forward)) for total in totals]


def _step(shape: Shape, layout: Layout, hardware: Hardware) -> StepSeconds:
    stages = [_stage(shape, layout, hardware, stage) for stage in range(layout.pp)]
    slowest = max(stages, key=lambda work: work.total)
    rounds = layout.micro_batches
    others = sum(work.total for work in stages) - slowest.total
    transfer = _pipeline_transfer(shape, layout, hardware)
    return StepSeconds(
        products=rounds * slowest.products,
        attention=rounds * slowest.attention,
        elementwise=rounds * slowest.elementwise,
        tensor_parallel=rounds * slowest.tensor_parallel,
        context_parallel=rounds * slowest.context_parallel,
        pipeline_transfer=transfer,
        bubble=others / layout.chunks,
        data_parallel=_data_parallel(shape, layout, hardware),
        optimizer=_optimizer(shape, layout, hardware),
    )


def _stage(shape: Shape, layout: Layout, hardware: Hardware, stage: int) -> _Work:
    work = _Work().plus(_layer(shape, layout, hardware), layout.layers_of(stage))
    if stage == layout.pp - 1:
        work = work.plus(_head(shape, layout, hardware))
    return work


def _layer(shape: Shape, layout: Layout, hardware: Hardware) -> _Work:
    tokens, t = _tokens(layout), layout.tp
    h, a = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    g = shape.num_query_groups * shape.head_dim
    f = shape.ffn_hidden_size
    products = 2 * tokens * shape.layer_weights / t / _product_rate(layout, hardware)
    attention = 2 * tokens * layout.seq_length * a / t / _attention_rate(layout, hardware)
    norm_share = 1 / t if layout.sequence_parallel else 1.0
    rotation = 4 * (a + g) / t
    moved = _ITEM * tokens * (10 * h * norm_share + rotation + ((3 if shape.gated else 2) * f) / t)
    if layout.attention == "unfused":  # the whole square, and its scores through memory
        attention *= 2
        moved += _SCORE_BYTES * tokens * layout.seq_length * shape.num_attention_heads / t
    elementwise = moved / (hardware.efficiency["hbm"] * hardware.hbm_bytes_per_s) + 8 * _KERNEL_SECONDS
    tensor = 4 * _collective(_ITEM * tokens * h, t, hardware.nvlink_bytes_per_s, hardware)
    context = 0.0
    if layout.cp > 1:
        sent = 2 * _ITEM * tokens * g / t * (layout.cp - 1)
        context = max(0.0, sent / _link(layout, layout.cp * t, hardware) - attention)
    forward = {"none": 3.0, "selective": 3.0, "full": 4.0}[layout.recompute]
    other = 1.0 if layout.reference else 0.0
    in_mlp = 3 * f * h / shape.layer_weights if layout.recomputes("mlp") else 0.0
    weight_gradients = 0.0 if layout.lora_rank is None else 1.0  # that a frozen weight does without
    adapters = 2 * tokens * _adapter_weights(shape, layout) / _product_rate(layout, hardware)
    return _Work(
        products=products * (forward - weight_gradients + in_mlp + other) + adapters * (forward + in_mlp),
        # the backward pass computes the scores again: 2.5 products for 2
        attention=attention * (forward + 0.5 + other),
        elementwise=elementwise * (forward + other),
        tensor_parallel=tensor
        * ((2.0 if forward == 3.0 else 3.0) + other)
        * (1.0 - (hardware.efficiency["overlap"] if layout.overlap_tensor_parallel else 0.0)),
        context_parallel=context * (2 + other),
    )


def _head(shape: Shape, layout: Layout, hardware: Hardware) -> _Work:
    tokens, t = _tokens(layout), layout.tp
    rows = shape.vocab_size / t
    moved = tokens * rows * 22  # logits in bf16, as fp32, exponentials, probabilities, their gradient
    passes = 3 if layout.lora_rank is None else 2  # a frozen weight does without its gradient
    if layout.reference:
        moved += tokens * rows * _DIVERGENCE_BYTES
        passes += 1
    if chunk_of(layout.loss_chunk, tokens, rows) is not None:  # forward once more
        moved += tokens * rows * 12
        passes += 1
    return _Work(
        products=passes * 2 * tokens * shape.head_weights / t / _product_rate(layout, hardware),
        elementwise=moved / (hardware.efficiency["hbm"] * hardware.hbm_bytes_per_s),
        tensor_parallel=2 * _collective(_ITEM * tokens * shape.hidden_size, t, hardware.nvlink_bytes_per_s, hardware),
    )


def _pipeline_transfer(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    """Exposed seconds of the exchange between stages: the interleaved schedule hides it behind computation."""
    if layout.pp == 1:
        return 0.0
    share = 1 / layout.tp if layout.sequence_parallel else 1.0
    message = _ITEM * _tokens(layout) * shape.hidden_size * share
    one = message / _link(layout, layout.gpus, hardware) + _MESSAGE_SECONDS
    if layout.chunks > 1:
        return 2 * (layout.pp - 1) * one
    return 2 * (layout.micro_batches + layout.pp - 1) * one


def _data_parallel(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    """Exposed seconds of reducing gradients (fp32) and gathering weights (bf16)."""
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    link = _link(layout, layout.tp * ranks, hardware)
    weights = _stage_weights(shape, layout)
    reduce = _collective(4 * weights, ranks, link, hardware)
    gather = _collective(_ITEM * weights, ranks, link, hardware)
    parts = max(4, layout.chunks)
    exposed = (1 / parts if layout.overlap_grad_reduce else 1.0) * reduce
    return exposed + (1 / parts if layout.overlap_param_gather else 1.0) * gather


def _optimizer(shape: Shape, layout: Layout, hardware: Hardware) -> float:
    """AdamW reads gradient, weight and moments and writes all but the gradient, which its norm has read before."""
    ranks = layout.dp * layout.cp if layout.distributed_optimizer else 1
    moved = (4 + 4 + 2 * 12 + 2) * _stage_weights(shape, layout) / ranks
    on_host = layout.offload_ratio * 16 * _stage_weights(shape, layout) / ranks / 25e9  # PCIe, both ways
    return moved / (hardware.efficiency["hbm"] * hardware.hbm_bytes_per_s) + on_host


def _adapter_weights(shape: Shape, layout: Layout) -> float:
    """Elements of a layer's adapters on one rank: tensor parallelism cuts one factor of each."""
    if layout.lora_rank is None:
        return 0.0
    h, f, t = shape.hidden_size, shape.ffn_hidden_size, layout.tp
    a, g = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    sizes = {name: h + rows / t for name, rows in (("q_proj", a), ("k_proj", g), ("v_proj", g))}
    sizes |= {"gate_proj": h + f / t, "up_proj": h + f / t, "o_proj": a / t + h, "down_proj": f / t + h}
    return layout.lora_rank * sum(sizes[name] for name in layout.lora_targets)


def _stage_weights(shape: Shape, layout: Layout) -> float:
    """Weights that a rank of the largest stage trains."""
    if layout.lora_rank is not None:
        return max(layout.layers_per_stage) * _adapter_weights(shape, layout)
    head = shape.head_weights
    return (max(layout.layers_per_stage) * shape.layer_weights + head * (2 if layout.pp == 1 else 1)) / layout.tp


def _collective(count: float, ranks: int, bytes_per_s: float, hardware: Hardware) -> float:
    """Seconds of a gather or a reduce-scatter of `count` bytes in all, as a ring."""
    if ranks == 1:
        return 0.0
    return count * (ranks - 1) / ranks / (hardware.efficiency["link"] * bytes_per_s) + _MESSAGE_SECONDS


def _link(layout: Layout, ranks: int, hardware: Hardware) -> float:
    """Bytes per second between ranks that span so many neighbouring GPUs."""
    return hardware.nvlink_bytes_per_s if ranks <= layout.gpus_per_node else hardware.network_bytes_per_s


def _product_rate(layout: Layout, hardware: Hardware) -> float:
    """Operations per second of the matrix products. Few tokens do not fill a GPU.

    Half of the speed is reached with as many tokens as the GPU computes operations while it reads a byte.
    """
    precision = number_format(layout, hardware)
    half_tokens = hardware.peak_flops["bf16"] / hardware.hbm_bytes_per_s
    filled = _tokens(layout) / (_tokens(layout) + half_tokens)
    return hardware.peak_flops[precision] * hardware.efficiency[precision] * filled


def number_format(layout: Layout, hardware: Hardware) -> str:
    """Return the format of the matrix products: a GPU without fp8 computes them in bf16."""
    return "fp8" if layout.fp8 and "fp8" in hardware.peak_flops else layout.dtype


def _attention_rate(layout: Layout, hardware: Hardware) -> float:
    return hardware.peak_flops[layout.dtype] * hardware.efficiency["attention"]


def _tokens(layout: Layout) -> float:
    return layout.micro_batch_size * layout.seq_length / layout.cp
