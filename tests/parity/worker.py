"""Runs many rows of the parity tables in one launch of N ranks: `torchrun worker.py RANKS MODELS_DIR OUT.json`.

Starting processes and importing costs more than the rows themselves.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

adapt_megatron_core_to_cpu()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

from megatron_cpt.architecture.families import read_architecture, read_config  # noqa: E402
from megatron_cpt.architecture.rope import with_rope  # noqa: E402
from megatron_cpt.config.derive import derive  # noqa: E402
from megatron_cpt.config.load import build_config  # noqa: E402
from megatron_cpt.config.sections.forgetting import EwcConfig, ForgettingConfig, KlConfig  # noqa: E402
from megatron_cpt.data.datasets import Dataset  # noqa: E402
from megatron_cpt.data.micro_batch import MicroBatch  # noqa: E402
from megatron_cpt.errors import CheckpointError  # noqa: E402
from megatron_cpt.forgetting.ewc import WeightPenalty, weight_penalties  # noqa: E402
from megatron_cpt.forgetting.fisher import estimate_fisher, for_fisher  # noqa: E402
from megatron_cpt.forgetting.kl import KlToBase, KlToStored  # noqa: E402
from megatron_cpt.forgetting.kl_store import KlStore, top_log_probabilities  # noqa: E402
from megatron_cpt.forgetting.reference import load_reference  # noqa: E402
from megatron_cpt.launch.fisher import FisherJob  # noqa: E402
from megatron_cpt.launch.identity import identity_of  # noqa: E402
from megatron_cpt.launch.origin import Origin  # noqa: E402
from megatron_cpt.model.build import build_model  # noqa: E402
from megatron_cpt.model.load_hf import load_hf_weights  # noqa: E402
from megatron_cpt.model.owned_parameters import owned_parameters  # noqa: E402
from megatron_cpt.runtime.distributed import init_parallel_groups, init_runtime, shutdown_runtime  # noqa: E402
from megatron_cpt.train.fisher import save_fisher  # noqa: E402
from megatron_cpt.train.state import TrainState, build_train_state, unwrap  # noqa: E402
from megatron_cpt.train.step import train_step  # noqa: E402
from megatron_cpt.train.terms import LossTerm  # noqa: E402
from tests.parity.digest import Recorder  # noqa: E402
from tests.parity.rows import BASE_PRECISION, LOGITS_ROWS, STEPS, TRAIN_ROWS, LogitsRow, TrainRow  # noqa: E402
from tests.parity.sabotage import SABOTAGES  # noqa: E402
from tests.parity.shared_groups import run_worker  # noqa: E402
from tests.parity.terms import SecondCrossEntropy  # noqa: E402
from tests.parity.tiny_models import MODELS, hf_model  # noqa: E402

SEQ_LENGTH, GLOBAL_BATCH, LR = 32, 4, 5e-4
NOT_OF_FISHER = ("document_ids", "source", "offset_tokens")
FISHER_SAMPLES = 5  # odd, so that one of two data-parallel ranks has nothing left at the end


def config_of(row: TrainRow | LogitsRow, models_dir: Path) -> Any:
    base = {
        "job_name": "parity",
        "model.init_from": str(models_dir / row.model),
        "parallel.gpus_per_node": row.ranks,
        "batch.seq_length": SEQ_LENGTH,
        "batch.global_batch_size": GLOBAL_BATCH,
        "batch.micro_batch_size": 2,
        "budget.train_tokens": STEPS * GLOBAL_BATCH * SEQ_LENGTH,
        "budget.warmup_tokens": 0,
        "optimizer.lr": LR,
        **BASE_PRECISION,
        **row.overrides,
    }
    if isinstance(row, LogitsRow) and row.rope is not None:
        base["model.rope"] = row.rope
    tree: dict[str, Any] = {}
    for key, value in base.items():
        section, _, name = key.partition(".")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return build_config(tree)


def sample(step: int, index: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """A sample of the global batch, the same under every layout: learnable text, a ragged mask, documents."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    start, stride = torch.randint(0, vocab_size, (2,), generator=generator).tolist()
    tokens = (start + (1 + stride % 7) * torch.arange(SEQ_LENGTH + 1)) % vocab_size
    counted = 3 + index * 8  # so that micro batches differ in the tokens that count
    ends = torch.randperm(SEQ_LENGTH - 2, generator=generator)[:3] + 1
    begins = torch.zeros(SEQ_LENGTH, dtype=torch.int64)
    begins[ends] = 1
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": (torch.arange(SEQ_LENGTH) < counted).float(),
        "position_ids": torch.arange(SEQ_LENGTH),
        "document_ids": begins.cumsum(0),
        "source": torch.tensor(index % 2),
        "offset_tokens": torch.tensor((step * GLOBAL_BATCH + index) * SEQ_LENGTH),
    }


def batches(config: Any, vocab_size: int, documents: bool) -> Iterator[MicroBatch]:
    dp = parallel_state.get_data_parallel_world_size()
    rank, size = parallel_state.get_data_parallel_rank(), config.batch.micro_batch_size
    for step in range(STEPS):
        for micro in range(GLOBAL_BATCH // (size * dp)):
            samples = [sample(step, (micro * dp + rank) * size + i, vocab_size) for i in range(size)]
            keys = [key for key in samples[0] if documents or key != "document_ids"]
            yield cast(MicroBatch, {key: torch.stack([one[key] for one in samples]) for key in keys})


@torch.no_grad()
def stored_targets(row: TrainRow, arch: Any, models_dir: Path) -> KlStore:
    """What the reference says of all samples, from transformers: the same under every layout."""
    asked = KlConfig(**cast(dict[str, Any], row.kl))
    top_k, tokens = asked.offline_top_k or 0, STEPS * GLOBAL_BATCH * SEQ_LENGTH
    folder = models_dir / f"targets_{row.ranks}_{torch.distributed.get_rank()}"
    folder.mkdir(exist_ok=True)
    (folder / "ids").write_bytes(bytes(4 * top_k * tokens))
    (folder / "logq").write_bytes(bytes(2 * (top_k + 1) * tokens))
    store = KlStore(folder / "ids", folder / "logq", tokens, top_k, "r+")
    dense = hf_model(row.kl_reference, seed=list(MODELS).index(row.kl_reference))
    for step in range(STEPS):
        samples = [sample(step, index, arch.vocab_size) for index in range(GLOBAL_BATCH)]
        logits = dense(torch.stack([one["tokens"] for one in samples])).logits
        ids, log_q = top_log_probabilities(
            logits, top_k, first_row=0, real_rows=arch.vocab_size, temperature=asked.temperature
        )
        for index, one in enumerate(samples):
            store.write(
                range(int(one["offset_tokens"]), int(one["offset_tokens"]) + SEQ_LENGTH), ids[index], log_q[index]
            )
    return store


def terms_of(row: TrainRow, config: Any, arch: Any, models_dir: Path) -> tuple[LossTerm, ...]:
    if row.kl is not None and "offline_top_k" in row.kl:
        store = stored_targets(row, arch, models_dir)
        return (KlToStored(KlConfig(**row.kl), {"0": store, "1": store}, ["0", "1"], arch.vocab_size),)
    if row.kl is not None:
        reference = load_reference(config, arch, Origin("hf", models_dir / row.kl_reference))
        return (KlToBase(KlConfig(**row.kl), reference, ["0", "1"], arch.vocab_size),)
    return (SecondCrossEntropy(row.term_weight),) if row.term_weight else ()


def fisher_of(row: TrainRow, config: Any, arch: Any, models_dir: Path) -> Path:
    """A folder with Fisher values of the row's model, estimated under its layout."""
    folder = models_dir / f"fisher_{row.ranks}" / row.name
    chunks = build_model(for_fisher(config), arch)
    load_hf_weights(chunks, models_dir / row.model, arch)
    tokens = estimate_fisher(chunks, fisher_sample, FISHER_SAMPLES, seed=7, vocab_size=arch.vocab_size)
    identity = identity_of(models_dir / row.model)
    dataset = Dataset("parity", "parity", "", 0, 0, 0)
    save_fisher(
        chunks, FisherJob(config, arch, Origin("hf", folder), identity, dataset, FISHER_SAMPLES, folder), tokens
    )
    return folder


def fisher_sample(number: int) -> MicroBatch:
    one = sample(1000, number, 512)
    return cast(MicroBatch, {key: one[key].unsqueeze(0) for key in one if key not in NOT_OF_FISHER})


def penalties_of(
    row: TrainRow, config: Any, state: TrainState, models_dir: Path, fisher: Path | None
) -> tuple[WeightPenalty, ...]:
    """EWC, or the penalty on the distance from the weights of `reference`, which the state holds only for a moment."""
    chunks = [unwrap(chunk) for chunk in state.chunks]
    if fisher is not None:
        ewc = {"forgetting": ForgettingConfig(ewc=EwcConfig(strength=row.ewc, fisher=str(fisher)))}
        owned = owned_parameters(chunks, state.optimizer)
        return weight_penalties(config.model_copy(update=ewc), state.arch, owned)
    if not row.l2sp:
        return ()
    load_hf_weights(chunks, models_dir / "reference", state.arch)
    state.optimizer.reload_model_params()
    base = [parameter.values.clone() for parameter in owned_parameters(chunks, state.optimizer)]
    load_hf_weights(chunks, models_dir / row.model, state.arch)
    state.optimizer.reload_model_params()
    return (WeightPenalty(row.l2sp, base),)


def run_train(row: TrainRow, models_dir: Path) -> dict[str, Any]:
    config = config_of(row, models_dir)
    arch = read_architecture(models_dir / row.model)
    derived = derive(config, arch)
    init_parallel_groups(config)
    with SABOTAGES[row.sabotage]() if row.sabotage else contextlib.nullcontext():
        fisher = None
        if row.ewc:
            init_parallel_groups(for_fisher(config))
            fisher = fisher_of(row, config, arch, models_dir)
            init_parallel_groups(config)
        state = build_train_state(config, arch, bucket_elements=row.bucket_elements)
        state.penalties = penalties_of(row, config, state, models_dir, fisher)
        recorder = Recorder(state)
        data = batches(config, arch.vocab_size, row.documents)
        terms = terms_of(row, config, arch, models_dir)
        results = [
            train_step(state, list(islice(data, derived.gradient_accumulation_steps)), num_sources=2, terms=terms)
            for _ in range(STEPS)
        ]
    return {
        "digest": recorder.digest(),
        "terms": [r.terms for r in results],
        "loss": [r.loss for r in results],
        "grad_norm": [r.grad_norm for r in results],
        "tokens": [r.loss_tokens for r in results],
        "source_tokens": [r.source_tokens for r in results],
        "source_loss_sums": [r.source_loss_sums for r in results],
    }


def run_logits(row: LogitsRow, models_dir: Path) -> dict[str, Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = config_of(row, models_dir)
    arch = read_architecture(models_dir / row.model, config.model.rope_change)
    derive(config, arch)
    init_parallel_groups(config)
    with SABOTAGES[row.sabotage]() if row.sabotage else contextlib.nullcontext():
        state = build_train_state(config, arch)
    tokens = torch.randint(0, arch.vocab_size, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(7))
    on_device = tokens.to(state.device)
    positions = torch.arange(SEQ_LENGTH, device=state.device).expand(2, -1)
    for chunk in state.chunks:
        chunk.eval()
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=lambda _, model: (model(on_device, positions, None), lambda out, non_loss_data: out),
            data_iterator=None,
            model=state.chunks[0],
            num_microbatches=1,
            seq_length=SEQ_LENGTH,
            micro_batch_size=2,
            forward_only=True,
            collect_non_loss_data=True,
        )
    difference = torch.zeros(1, device=state.device)
    if parallel_state.is_pipeline_last_stage():
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(outputs[0])[..., : arch.vocab_size]
        with torch.no_grad():
            reference = _in_transformers(row, config, models_dir)(tokens).logits
        difference = (logits - reference.to(state.device)).abs().max().view(1)
    torch.distributed.all_reduce(difference, op=torch.distributed.ReduceOp.MAX)
    return {"difference": difference.item()}


def _in_transformers(row: LogitsRow, config: Any, models_dir: Path) -> torch.nn.Module:
    model = hf_model(row.model, seed=list(MODELS).index(row.model))
    if row.rope is None:
        return model
    changed = AutoConfig.for_model(**with_rope(read_config(models_dir / row.model), config.model.rope_change))
    stretched = type(model)(changed).float().eval()
    stretched.load_state_dict(model.state_dict())
    return stretched


def run_damaged_load(models_dir: Path) -> dict[str, Any]:
    """What each rank is told when only the last one meets a NaN in its slice of a weight."""
    row = TrainRow("damaged", torch.distributed.get_world_size(), {"parallel.tp": torch.distributed.get_world_size()})
    config = config_of(row, models_dir)
    init_parallel_groups(config)
    folder = models_dir / f"damaged_{row.ranks}"
    if torch.distributed.get_rank() == 0:
        shutil.copytree(models_dir / row.model, folder, dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.down_proj.weight"][0, -1] = float("nan")  # the last TP rank's columns
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.distributed.barrier()
    told: str | None = None
    try:
        load_hf_weights(build_model(config, read_architecture(folder)), folder, read_architecture(folder))
    except CheckpointError as error:
        told = error.message
    messages: list[str | None] = [None] * row.ranks
    torch.distributed.all_gather_object(messages, told)
    return {"messages": messages}


def main() -> None:
    ranks, models_dir, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    only = set(sys.argv[4:])
    rows = [r for r in (*LOGITS_ROWS, *TRAIN_ROWS) if r.ranks == ranks and (not only or r.name in only)]
    runtime = init_runtime(config_of(rows[0], models_dir))
    results = {}
    for row in rows:
        results[row.name] = run_train(row, models_dir) if isinstance(row, TrainRow) else run_logits(row, models_dir)
    if ranks == 2 and (not only or "damaged_load" in only):
        results["damaged_load"] = run_damaged_load(models_dir)
    if runtime.rank == 0:
        out.write_text(json.dumps(results))
    shutdown_runtime()


if __name__ == "__main__":
    run_worker(main)
