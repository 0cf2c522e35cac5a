"""What one GPU is compared in, as data: rows of the parity table with another device, and their bounds.

Every row is trained on the GPU and compared with its baseline, the same model in plain fp32 or bf16 on the CPU. The
bounds are those of two devices that add in another order: on an H100, fp32 rows were within 1.4e-7 and 5.9e-7, bf16
rows within 3e-4 and 1.2e-3. The rows of TransformerEngine have not been run on a GPU yet, nor have their bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.parity.rows import BF16, DOCUMENTS, SDPA, SELECTIVE, SINGLES, LogitsRow, TrainRow

# (loss, absolute; gradient norm, relative) over 20 steps
FP32 = (1e-5, 1e-4)
TF32 = (1e-2, 5e-2)  # TransformerEngine multiplies fp32 matrices in TF32
BF16_BOUND = (5e-3, 2e-2)
FP8_BOUND = (1e-1, 3e-1)


@dataclass(frozen=True)
class GpuRow:
    row: TrainRow
    bounds: tuple[float, float] = FP32
    needs: tuple[str, ...] = ()  # modules without which the row is refused; it is reported with the reason
    adam: str | None = None  # whose kernel: te, apex or torch; None: what the project chooses

    @property
    def name(self) -> str:
        return self.row.name


TE = {"model.attention": "te"}
_TE = ("transformer_engine",)

# On the CPU, each once: what the rows name as their baseline.
BASELINES = (
    TrainRow("base", 1),
    TrainRow("base_bf16", 1, BF16),
    TrainRow("base_documents", 1, DOCUMENTS, documents=True),
)
ROWS: tuple[GpuRow, ...] = (
    GpuRow(TrainRow("fp32_sdpa", 1, SDPA, baseline="base")),
    GpuRow(TrainRow("fp32_unfused", 1, {"model.attention": "unfused"}, baseline="base")),
    GpuRow(TrainRow("fp32_te", 1, TE, baseline="base"), TF32, _TE),
    GpuRow(TrainRow("fp32_accumulation_4", 1, SDPA | SINGLES, baseline="base")),
    GpuRow(TrainRow("fp32_recompute_full", 1, SDPA | {"recompute.granularity": "full"}, baseline="base")),
    GpuRow(TrainRow("fp32_recompute_selective", 1, SDPA | SELECTIVE, baseline="base")),
    GpuRow(TrainRow("fp32_documents_sdpa", 1, SDPA | DOCUMENTS, baseline="base_documents", documents=True)),
    GpuRow(TrainRow("fp32_documents_te", 1, TE | DOCUMENTS, baseline="base_documents", documents=True), TF32, _TE),
    GpuRow(TrainRow("bf16_sdpa", 1, SDPA | BF16, baseline="base_bf16"), BF16_BOUND),
    GpuRow(TrainRow("bf16_te", 1, TE | BF16, baseline="base_bf16"), BF16_BOUND, _TE),
    GpuRow(TrainRow("fp8_te", 1, TE | BF16 | {"precision.fp8": "hybrid"}, baseline="base_bf16"), FP8_BOUND, _TE),
    GpuRow(TrainRow("adam_torch", 1, SDPA, baseline="base"), adam="torch"),
    GpuRow(TrainRow("adam_apex", 1, SDPA, baseline="base"), needs=("apex",), adam="apex"),
    GpuRow(TrainRow("adam_te", 1, SDPA, baseline="base"), needs=_TE, adam="te"),
    # negative controls: they must leave ten times the bounds
    GpuRow(TrainRow("sabotage_micro_batch_mean", 1, SDPA, baseline="base", sabotage="mean_per_micro_batch")),
    GpuRow(TrainRow("sabotage_documents", 1, SDPA, baseline="base_documents", sabotage="whole_sequence_attention")),
)
LOGITS = tuple(LogitsRow(model, 1, SDPA, bound=1e-4) for model in ("qwen2", "qwen3_tied", "llama3_rope", "mistral"))
