"""Real Megatron-Core reads and writes what the converter wrote and reads: `torchrun convert_worker.py DIR`.

For each row: the model is built under a layout and its weights set straight from the Hugging Face folder, which the
other parity tests prove; then the same weights must come out of torch_dist and legacy files that the
converter wrote, and a torch_dist checkpoint is saved for the converter to read back.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

adapt_megatron_core_to_cpu()

from convert_rows import RANKS, ROWS  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from megatron_cpt.architecture.families import read_architecture  # noqa: E402
from megatron_cpt.config.load import build_config  # noqa: E402
from megatron_cpt.model.build import build_model  # noqa: E402
from megatron_cpt.model.load_hf import load_hf_weights  # noqa: E402
from megatron_cpt.model.load_megatron import load_megatron_weights  # noqa: E402
from megatron_cpt.runtime.distributed import init_parallel_groups, init_runtime, shutdown_runtime  # noqa: E402


def config_of(model_dir: Path, tp: int, pp: int, vpp: int | None) -> Any:
    parallel = {"gpus_per_node": RANKS, "tp": tp, "pp": pp, "vpp": vpp}
    precision = {"dtype": "fp32"}
    return build_config(
        {"job_name": "convert", "model": {"init_from": str(model_dir)}, "parallel": parallel, "precision": precision}
    )


def snapshot(chunks: list[torch.nn.Module]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


def differing(chunks: list[torch.nn.Module], wanted: list[torch.Tensor]) -> list[str]:
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    found = snapshot(chunks)
    return [name for name, a, b in zip(names, found, wanted, strict=True) if not torch.equal(a, b)]


def forget(chunks: list[torch.nn.Module]) -> None:
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))


def legacy_file(folder: Path) -> Path:
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    return folder / "iter_0000001" / name / "model_optim_rng.pt"


def run_row(work: Path, row: tuple[str, str, int, int, int | None]) -> dict[str, Any]:
    name, model, tp, pp, vpp = row
    config = config_of(work / "models" / model, tp, pp, vpp)
    arch = read_architecture(work / "models" / model)
    init_parallel_groups(config)
    chunks = build_model(config, arch)
    load_hf_weights(chunks, work / "models" / model, arch)
    wanted = snapshot(chunks)

    load_megatron_weights(chunks, work / name / "torch_dist")
    wrong = {"torch_dist": differing(chunks, wanted)}

    forget(chunks)
    state = torch.load(legacy_file(work / name / "legacy"), weights_only=False)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}" if vpp else "model"], strict=True)
    wrong["legacy"] = differing(chunks, wanted)

    saved = work / name / "saved"
    if torch.distributed.get_rank() == 0:
        saved.mkdir()
    torch.distributed.barrier()
    keys = [f"model{i}" if vpp else "model" for i in range(len(chunks))]
    load_hf_weights(chunks, work / "models" / model, arch)
    dist_checkpointing.save(
        {key: chunk.sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}, str(saved)
    )
    own = legacy_file(work / name / "saved_legacy")
    if parallel_state.get_data_parallel_rank() == 0:
        own.parent.mkdir(parents=True)
        torch.save({key: chunk.state_dict() for key, chunk in zip(keys, chunks, strict=True)}, own)
    everywhere: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(everywhere, wrong)
    return {kind: sorted({n for found in everywhere for n in found[kind]}) for kind in wrong}


def main(work: Path) -> None:
    init_runtime(config_of(work / "models" / "qwen2", 1, 1, None))
    results: dict[str, Any] = {}
    for row in ROWS:
        try:
            results[row[0]] = run_row(work, row)
        except Exception:
            results[row[0]] = {"error": traceback.format_exc()}
            break  # ranks may be out of step
    if torch.distributed.get_rank() == 0:
        (work / "results.json").write_text(json.dumps(results))
    shutdown_runtime()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
