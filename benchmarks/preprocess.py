"""Speed of preprocessing against its peers: whole processes, one worker each, interleaved, MB per CPU-second.

    python benchmarks/preprocess.py --input corpus.jsonl --tokenizer MODEL_DIR --work /tmp/bench \
        --megatron-lm CHECKOUT --peers-python PYTHON

CPU-seconds (user and system, of the process and its children) are the stable figure on a shared machine; wall time is
printed beside them. Peers are optional and are fetched by whoever runs this: a checkout of NVIDIA/Megatron-LM for its
preprocess_data.py, and a Python that has `datatrove` and `gigatoken`. A slow peer gets the first --slow-mb of the input
and is measured without its start (the same command on one document is subtracted); ours is the whole process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

REPO = Path(__file__).resolve().parents[1]

# Ours with tokenisation free: reading, parsing, splitting batches, EOD, writing and hashing remain.
FREE = """
import sys
import numpy as np
from megatron_cpt.corpus import preprocess as run
from megatron_cpt.corpus.schema import parse_corpus
from dataclasses import replace
load = run.load_tokenizer
def free(texts):
    lengths = np.fromiter(map(len, texts), np.int64, len(texts)) // 4
    return np.zeros(int(lengths.sum()), np.int32), lengths
run.load_tokenizer = lambda *a, **k: replace(load(*a, **k | {"backend": "reference"}), encode_batch=free)
raw = {"output_prefix": sys.argv[2], "tokenizer": sys.argv[3], "sources": [{"files": sys.argv[1]}]}
run.preprocess(parse_corpus(raw, "benchmark"), workers=1, overwrite=True)
"""

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
folder, name, out, tokenizer = sys.argv[1:5]
LocalPipelineExecutor(pipeline=[JsonlReader(folder, glob_pattern=name), MegatronDocumentTokenizer(
    output_folder=out, tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token="<|endoftext|>")],
    tasks=1, workers=1, logging_dir=out + "/logs", skip_completed=False).run()
"""


@dataclass(frozen=True)
class Measurement:
    cpu_seconds: float
    wall_seconds: float
    peak_mib: float


def measure(command: Sequence[str], environment: dict[str, str], cwd: Path = REPO) -> Measurement:
    """Run a command to its end; CPU time includes its children."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=os.environ | environment, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{errors.decode()[-2000:]}")
    return Measurement(usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / 1024)


def cut(source: Path, target: Path, size_bytes: int) -> Path:
    """The first lines of `source` up to about `size_bytes`."""
    written = 0
    with source.open("rb") as lines, target.open("wb") as out:
        for line in lines:
            out.write(line)
            written += len(line)
            if written >= size_bytes:
                break
    return target


@dataclass(frozen=True)
class Tool:
    name: str
    slow: bool
    python: str
    arguments: tuple[str, ...]  # {input}, {folder}, {file} and {output} stand for paths
    environment: dict[str, str]

    def run(self, file: Path, output: Path) -> Measurement:
        values = {"{input}": str(file), "{folder}": str(file.parent), "{file}": file.name, "{output}": str(output)}
        command = [self.python, *(values.get(argument, argument) for argument in self.arguments)]
        return measure(command, {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | self.environment)


def tools(tokenizer: str, megatron_lm: str | None, peers_python: str | None) -> list[Tool]:
    cli = ("-c", "from megatron_cpt.cli import main; main()", "preprocess", "--overwrite", "--workers", "1")
    ours = (*cli, "--input", "{input}", "--output-prefix", "{output}", "--tokenizer", tokenizer)
    chosen = [
        Tool("megatron-cpt", False, sys.executable, ours, {}),
        Tool("tokenisation free", False, sys.executable, ("-c", FREE, "{input}", "{output}", tokenizer), {}),
    ]
    if megatron_lm:
        flags = (
            "--input {input} --output-prefix {output} --tokenizer-type HuggingFaceTokenizer --append-eod --workers 1"
        )
        script = (f"{megatron_lm}/tools/preprocess_data.py", *flags.split(), "--tokenizer-model", tokenizer)
        path = os.pathsep.join([megatron_lm, os.environ.get("PYTHONPATH", "")])
        chosen.append(Tool("Megatron-LM preprocess_data.py", True, sys.executable, script, {"PYTHONPATH": path}))
    if peers_python:
        arguments = ("-c", DATATROVE, "{folder}", "{file}", "{output}", tokenizer)
        chosen.append(Tool("datatrove", True, peers_python, arguments, {}))
    return chosen


@click.command()
@click.option(
    "--input", "source", required=True, type=click.Path(path_type=Path, exists=True), help="jsonl with `text`."
)
@click.option("--tokenizer", required=True, help="Model folder with tokenizer.json.")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for outputs.")
@click.option("--megatron-lm", help="Checkout of NVIDIA/Megatron-LM.")
@click.option("--peers-python", help="A Python with datatrove.")
@click.option("--slow-mb", default=20, show_default=True, help="MB given to slow peers.")
@click.option("--repeats", default=3, show_default=True, help="Interleaved runs; the median is printed.")
def main(
    source: Path,
    tokenizer: str,
    work: Path,
    megatron_lm: str | None,
    peers_python: str | None,
    slow_mb: int,
    repeats: int,
) -> None:
    """Print one JSON object per tool: MB, CPU-seconds, MB per CPU-second, peak memory."""
    work.mkdir(parents=True, exist_ok=True)
    source, tokenizer = source.resolve(), str(Path(tokenizer).resolve())
    (work / "slow").mkdir(exist_ok=True)
    (work / "one").mkdir(exist_ok=True)
    slow = cut(source, work / "slow" / "in.jsonl", slow_mb * 1_000_000)
    one = cut(source, work / "one" / "in.jsonl", 1)
    runs: dict[str, list[Measurement]] = {}
    start_cpu: dict[str, float] = {}
    chosen = tools(tokenizer, megatron_lm, peers_python)
    for repeat in range(repeats):
        for tool in chosen:
            file = slow if tool.slow else source
            runs.setdefault(tool.name, []).append(tool.run(file, work / "out" / f"{tool.name.split()[0]}-{repeat}"))
            if tool.slow and tool.name not in start_cpu:
                start_cpu[tool.name] = tool.run(one, work / "out" / "one").cpu_seconds
    for tool in chosen:
        megabytes = (slow if tool.slow else source).stat().st_size / 1e6
        cpu = statistics.median(m.cpu_seconds for m in runs[tool.name])
        net = cpu - start_cpu.get(tool.name, 0.0)
        fields = {
            "tool": tool.name,
            "mb": round(megabytes, 1),
            "cpu_seconds": round(cpu, 2),
            "start_cpu_seconds": round(start_cpu.get(tool.name, 0.0), 2),
            "mb_per_cpu_second": round(megabytes / net, 2),
            "wall_seconds": round(statistics.median(m.wall_seconds for m in runs[tool.name]), 1),
            "peak_mib": round(max(m.peak_mib for m in runs[tool.name])),
        }
        click.echo(json.dumps(fields))


if __name__ == "__main__":
    main()
