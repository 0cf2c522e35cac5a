"""Bytes of a GPU, by part, for each pipeline stage: the one place where a rank's bytes are counted. No torch.

Symbols, per rank: T tokens of a micro-batch (micro_batch_size * seq_length / cp), t = tp, h hidden, f MLP rows,
a = heads * head_dim, g = key/value heads * head_dim, V padded vocabulary, e bytes of an activation (2 in bf16).

What a layer keeps for its backward pass (Korthikanti et al. 2022, arXiv:2205.05198, for attention that never holds the
matrix of scores (Dao 2023, arXiv:2307.08691) and a gated activation that keeps its input only):

    input and output of both norms        e * 4h           per token, / t under sequence parallelism
    q and k after the rotation            e * (a + g)      / t
    q, k, v before it, kept alive by v    e * (a + 2g)     / t
    output of the attention               e * a            / t
    gate and up, and their product        e * 3f           / t
    cosines and sines of q and k          e * 4 head_dim   per position

With forgetting.kl a frozen model lies beside the trained one. On the last stage it leaves the input of its output layer
of every micro-batch of the step, and the divergence keeps its gradient until the backward pass.

`megatron-cpt dry-run` counts the live bytes of the real model under the real schedule, and a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.linears import Linear, linears
from megatron_cpt.config.loss_chunk import chunk_of
from megatron_cpt.planner.layout import Layout

GIB = 2**30
MOMENT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}  # of one of AdamW's two, by optimizer.moments_dtype
# What no formula gives. The CUDA context with cuBLAS's workspace and NCCL of one rank, and what the allocator holds
# between its blocks, as a share of what lives there for one step only: both measured on an H200 with segments that grow
# (benchmarks/planner_memory.py --device cuda). NCCL's buffers of one group of several ranks are an assumption.
CONTEXT_BYTES = 2.82 * GIB
GROUP_BYTES = 0.3 * GIB
FRAGMENTATION = 0.02
# The divergence works on a part of a sample's tokens at a time, with so many fp32 copies of it:
# forgetting/vocab_parallel_kl.py, and forgetting/topk_kl.py likewise.
KL_PART_ELEMENTS = 2**24
_KL_COPIES = 5


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage when it holds most, by part."""

    stage: int
    layers: int
    parameters: int  # on this rank
    weights: int
    gradients: int
    optimizer: int
    activations: int  # of all micro-batches in flight
    logits: int  # of the last micro-batch: what the loss keeps
    transient: int  # beyond them, in the most demanding moment of the backward pass
    overhead: int
    host: int = 0  # optimizer state in the host's memory
    reference: int = 0  # the frozen model of forgetting.kl
    penalty: int = 0  # what forgetting.ewc holds

    @property
    def static(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.penalty

    @property
    def live(self) -> int:
        """Bytes that a step allocates and frees again."""
        return self.activations + self.logits + self.transient

    @property
    def total(self) -> int:
        """Bytes on the GPU in all."""
        return self.static + self.live + self.overhead


def memory_of_stages(arch: Architecture, layout: Layout) -> tuple[StageMemory, ...]:
    """Return the bytes of a rank of each pipeline stage, the first stage first."""
    return tuple(_stage(arch, layout, stage) for stage in range(layout.pp))


def worst_stage(stages: tuple[StageMemory, ...]) -> StageMemory:
    """Return the stage that holds most."""
    return max(stages, key=lambda stage: stage.total)


def parameters_of_stage(arch: Architecture, layout: Layout, stage: int) -> int:
    """Return the parameters of a rank of the stage: its part of embedding, layers, last norm and output layer.

    A tied output layer shares the embedding on a rank that holds both; on a last stage of its own it is a copy.
    """
    h, d, t = arch.hidden_size, arch.head_dim, layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    table = arch.padded_vocab_size(t) * h // t
    q_rows, kv_rows = arch.num_attention_heads * d, 2 * arch.num_query_groups * d
    layer = ((q_rows + kv_rows) * h + q_rows * h + 3 * arch.ffn_hidden_size * h) // t + 2 * h
    layer += (q_rows + kv_rows) // t if arch.qkv_bias else 0
    layer += 2 * d if arch.qk_norm else 0
    tables = int(first) + int(last and not (first and arch.tie_word_embeddings))
    return layer * layout.layers_of(stage) + tables * table + (h if last else 0)


def adapters_of_stage(arch: Architecture, layout: Layout, stage: int) -> int:
    """Return the parameters of the adapters of a rank of the stage.

    Of each pair tensor parallelism cuts the factor on the side where it cuts the linear; the other is whole.
    """
    if layout.lora_rank is None:
        return 0
    rank, t = layout.lora_rank, layout.tp
    sizes = [
        linear.in_features + linear.out_features // t
        if linear.split == "rows"
        else linear.in_features // t + linear.out_features
        for linear in _adapted(arch, layout)
    ]
    return rank * sum(sizes) * layout.layers_of(stage)


def optimizer_bytes_per_parameter(layout: Layout) -> int:
    """Return the bytes of optimizer state per parameter: an fp32 master weight where there is none, and two moments."""
    return (4 if layout.dtype == "bf16" else 0) + 2 * MOMENT_BYTES[layout.moments_dtype]


def activation_bytes_of_layer(arch: Architecture, layout: Layout) -> float:
    """Return what one layer keeps of one micro-batch, under the recomputation that `layout` asks for."""
    if layout.recompute == "full":
        return _item(layout) * _tokens(layout) * arch.hidden_size / _norm_split(layout)
    kept = _whole_layer(arch, layout)
    if layout.recomputes("mlp"):
        kept -= _mlp(arch, layout) + _of_adapters(arch, layout, in_mlp=True)
    return kept


def layers_in_flight(layout: Layout, stage: int) -> float:
    """Return how many layers' activations the stage holds at once, over all its micro-batches.

    1F1B: stage r of p runs p - r micro-batches ahead. Interleaved (Narayanan et al. 2021, arXiv:2104.04473): the chunks
    of the warm-up and the one that is computed.
    """
    p, v, m, layers = layout.pp, layout.chunks, layout.micro_batches, layout.layers_of(stage)
    if v == 1:
        return min(p - stage, m) * layers
    chunks = min(m * v, 2 * (p - stage - 1) + (v - 1) * p + 1)
    return chunks * layers / v


def _stage(arch: Architecture, layout: Layout, stage: int) -> StageMemory:
    adapters = adapters_of_stage(arch, layout, stage)
    parameters = parameters_of_stage(arch, layout, stage) + adapters
    trained = parameters if layout.lora_rank is None else adapters
    sharded = layout.dp * layout.cp if layout.distributed_optimizer else 1
    state = -(-optimizer_bytes_per_parameter(layout) * trained // sharded)
    host = int(state * layout.offload_ratio)
    activations = layers_in_flight(layout, stage) * activation_bytes_of_layer(arch, layout)
    if layout.reference and stage == layout.pp - 1:
        kept = _item(layout) * _tokens(layout) * arch.hidden_size / _norm_split(layout)
        activations += layout.micro_batches * kept
    logits, transient = _peak(arch, layout, stage)
    groups = sum(size > 1 for size in (layout.tp, layout.pp, layout.dp * layout.cp, layout.cp))
    overhead = CONTEXT_BYTES + groups * GROUP_BYTES + FRAGMENTATION * (activations + logits + transient)
    return StageMemory(
        stage=stage,
        layers=layout.layers_of(stage),
        parameters=parameters,
        weights=_item(layout) * parameters,
        gradients=4 * trained,
        optimizer=state - host,
        activations=int(activations),
        logits=int(logits),
        transient=int(transient),
        overhead=int(overhead),
        host=host,
        reference=_item(layout) * (parameters - adapters) if layout.reference else 0,
        penalty=-(-layout.penalty_bytes * trained // sharded),
    )


def _peak(arch: Architecture, layout: Layout, stage: int) -> tuple[float, float]:
    """Return (kept by the head, transient) at the moment that needs most: in the loss, or in the last layer's backward.

    The loss keeps the probabilities in fp32 and the last norm's input and output, and holds the logits in the dtype of
    the model beside them. Once it is behind, a layer's backward pass holds the gradients of the MLP.
    """
    h = arch.hidden_size
    in_layer = _layer_transient(arch, layout)
    if stage < layout.pp - 1:
        return 0.0, in_layer
    rows = arch.padded_vocab_size(layout.tp) / layout.tp
    if (chunk := chunk_of(layout.loss_chunk, _tokens(layout), rows)) is not None:
        return _peak_in_chunks(arch, layout, rows, chunk, in_layer)
    kept = _tokens(layout) * (4 * rows + 2 * _item(layout) * h / _norm_split(layout))
    in_loss = one = _tokens(layout) * _item(layout) * rows
    if layout.reference or layout.target_tokens:
        in_loss = _in_divergence(layout, rows)
    full_width = _item(layout) * _tokens(layout) * h  # the gradient of the last norm's output, of all tokens
    # the gradient of the output layer, before it is added to the fp32 sum
    weight = _item(layout) * rows * h if layout.lora_rank is None else 0
    in_linear = one + full_width + _gathered(arch, layout) + weight - 4 * _tokens(layout) * rows
    in_head = max(in_loss, in_linear)
    if kept + in_head >= in_layer:
        return kept, in_head
    return 0.0, in_layer


def _peak_in_chunks(
    arch: Architecture, layout: Layout, rows: float, chunk: int, in_layer: float
) -> tuple[float, float]:
    """As `_peak`, where the logits of `chunk` tokens exist at once: model/chunked_loss.py.

    The last norm's input and output are kept. The backward pass holds a chunk's logits as the whole head does, the
    gradient of the hidden states of all tokens, and that of the weight as an fp32 sum beside one chunk's.
    """
    h, item = arch.hidden_size, _item(layout)
    kept = 2 * _tokens(layout) * item * h / _norm_split(layout)
    grad_hidden = kept / 2
    weight = 0.0 if layout.lora_rank is not None else 4 * rows * h
    gathered = 2 * item * chunk * h if layout.sequence_parallel else item * chunk * h
    in_loss = (4 + item) * chunk * rows
    in_linear = item * chunk * rows + gathered + (item * rows * h if weight else 0)
    in_head = grad_hidden + weight + max(in_loss, in_linear)
    if kept + in_head >= in_layer:
        return kept, in_head
    return 0.0, in_layer


def _in_divergence(layout: Layout, rows: float) -> float:
    """Beyond what the loss keeps: in the divergence, or in the cross entropy after it.

    The first holds the logits of both models, or stored targets, and the gradient; the second the logits, that
    gradient, and in bf16 a copy of the logits, which in fp32 becomes the probabilities.
    """
    one = _tokens(layout) * _item(layout) * rows
    part = 4 * min(KL_PART_ELEMENTS, layout.seq_length / layout.cp * rows)
    held = 3 if layout.reference else 2
    return max(held * one + _KL_COPIES * part - 4 * _tokens(layout) * rows, (3 if _item(layout) == 2 else 2) * one)


def _layer_transient(arch: Architecture, layout: Layout) -> float:
    """What a layer's backward pass holds beyond what the forward pass kept, at its most."""
    tokens, item, t, h = _tokens(layout), _item(layout), layout.tp, arch.hidden_size
    stream = item * tokens * h / _norm_split(layout)  # the gradient of the layer's output
    rows = item * tokens * arch.ffn_hidden_size / t  # of one of gate, up and product
    weight = item * arch.ffn_hidden_size * h / t if layout.lora_rank is None else 0  # of one of the MLP's matrices
    gathered, full_width = _gathered(arch, layout), item * tokens * h
    in_activation = 3 * rows + gathered
    in_first_linear = 2 * rows - 3 * rows + gathered + full_width + 2 * weight  # what the activation kept is freed
    in_second_linear = rows + gathered + weight
    again = 0.0
    if layout.recompute == "full":
        again = _whole_layer(arch, layout)
    elif layout.recomputes("mlp"):
        again = _mlp(arch, layout) + _of_adapters(arch, layout, in_mlp=True) + stream
    in_attention = 0.0  # the MLP is behind
    if layout.attention == "unfused":  # gradients of scores and probabilities
        in_attention = 8 * tokens * layout.seq_length * arch.num_attention_heads / t - _mlp(arch, layout)
    in_norm = 16 * tokens * h / _norm_split(layout) if layout.attention == "block_causal" else 0.0  # a CPU's, in fp32
    return stream + max(in_activation, in_first_linear, in_second_linear, in_attention, in_norm) + again


def _whole_layer(arch: Architecture, layout: Layout) -> float:
    """What a layer keeps without recomputation."""
    tokens, item, t = _tokens(layout), _item(layout), layout.tp
    heads, groups, d = arch.num_attention_heads, arch.num_query_groups, arch.head_dim
    a, g = heads * d, groups * d
    inputs = 2 + _keeps_input(arch, layout, "linear_qkv") + _keeps_input(arch, layout, "linear_fc1")
    norms = tokens * (inputs * item * arch.hidden_size + 8) / _norm_split(layout)
    attention = item * (3 * a + 3 * g) + 4 * heads
    if layout.attention == "unfused":
        attention = item * 4 * a + layout.seq_length * ((4 + item) * heads + t)
    elif layout.cp > 1 and layout.attention == "sdpa":  # keys and values of the whole sequence, in its order
        attention += item * 2 * g * layout.cp
    if arch.qk_norm:
        attention += item * a + 4 * (heads + groups)
    rope = 4 * item * d * tokens / layout.micro_batch_size
    dropout = 2 * tokens * arch.hidden_size / _norm_split(layout) if layout.dropout else 0.0
    adapters = _of_adapters(arch, layout, in_mlp=True) + _of_adapters(arch, layout, in_mlp=False)
    return norms + tokens * attention / t + _mlp(arch, layout) + rope + dropout + adapters


def _of_adapters(arch: Architecture, layout: Layout, *, in_mlp: bool) -> float:
    """What the adapters of the MLP, or of the attention, keep: `rank` numbers per token, and dropped inputs."""
    kept = 0.0
    for linear in _adapted(arch, layout):
        if linear.module.startswith("mlp.") != in_mlp:
            continue
        row = linear.split == "columns"
        split = layout.tp if row and layout.sequence_parallel else 1
        kept += _item(layout) * _tokens(layout) * (layout.lora_rank or 0) / split
        if layout.lora_dropout:  # the input without what is dropped, and the mask
            cut = layout.tp if row or layout.sequence_parallel else 1
            kept += (_item(layout) + 1) * _tokens(layout) * linear.in_features / cut
    return kept


def _adapted(arch: Architecture, layout: Layout) -> list[Linear]:
    if layout.lora_rank is None:
        return []
    return [linear for name, linear in linears(arch).items() if name in layout.lora_targets]


def _mlp(arch: Architecture, layout: Layout) -> float:
    rows = 2 + _keeps_input(arch, layout, "linear_fc2")
    return rows * _item(layout) * _tokens(layout) * arch.ffn_hidden_size / layout.tp


def _keeps_input(arch: Architecture, layout: Layout, fused: str) -> bool:
    """Whether the backward pass needs the input of a linear: a frozen one without adapters does without."""
    return layout.lora_rank is None or any(linear.fused == fused for linear in _adapted(arch, layout))


def _gathered(arch: Architecture, layout: Layout) -> float:
    """Activations of all tokens that a linear layer gathers under sequence parallelism, and frees again."""
    return _item(layout) * _tokens(layout) * arch.hidden_size if layout.sequence_parallel else 0.0


def _tokens(layout: Layout) -> float:
    return layout.micro_batch_size * layout.seq_length / layout.cp


def _norm_split(layout: Layout) -> int:
    """Into how many parts the activations between the linear layers are cut."""
    return layout.tp if layout.sequence_parallel else 1


def _item(layout: Layout) -> int:
    return 2 if layout.dtype == "bf16" else 4
