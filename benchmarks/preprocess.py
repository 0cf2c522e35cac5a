"""Speed and memory of preprocessing against its peers: whole processes, one worker each, interleaved, in CPU-seconds.

    python benchmarks/preprocess.py tokenise --input corpus.jsonl --tokenizer MODEL_DIR --work /tmp/bench \
        --megatron-lm CHECKOUT --peers-python PYTHON
    python benchmarks/preprocess.py full --input corpus.jsonl --tokenizer MODEL_DIR --work /tmp/bench \
        --peers-python PYTHON
    python benchmarks/preprocess.py memory --input corpus.jsonl --tokenizer MODEL_DIR --work /tmp/bench

tokenise: jsonl to .bin/.idx. full: cleaning, C4, Gopher and FineWeb rules, exact and near duplicates, then tokens.
memory: peak memory of the largest process as the input grows; the input is repeated text with changed numbers.

CPU-seconds (user and system, of the process and its children) are the stable figure on a shared machine; wall time is
printed beside them. Peers are optional and are fetched by whoever runs this: a checkout of NVIDIA/Megatron-LM (its main
branch also has preprocess_data_fast.py, on gigatoken), and a Python with torch, transformers, gigatoken and datatrove.
Every tool is also run on one document: that is its start. "net" leaves it out, "whole" is the start and all of the
input at the net speed; the ratios compare like with like. A slow peer gets the first --slow-mb of the input only. Give
--input several times for corpora of different kinds: the last line is the range of the ratios over them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import zstandard

REPO = Path(__file__).resolve().parents[1]

# Ours with tokenisation free: reading, parsing, splitting batches, EOD, writing and hashing remain.
FREE = """
import sys
import numpy as np
from megatron_cpt.corpus.run import corpus_run, preprocess as run
from megatron_cpt.corpus.schema import parse_corpus
from dataclasses import replace
load = corpus_run.load_tokenizer
def load_free(*args, **keys):
    tokenizer = load(*args, **keys | {"backend": "reference"})
    no_eod = int(tokenizer.eod_id == 0)
    def free(texts):
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) // 4
        return np.full(int(lengths.sum()), no_eod, np.int32), lengths
    return replace(tokenizer, encode_batch=free)
corpus_run.load_tokenizer = load_free
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


# The same rules and stages as FULL_CORPUS, as datatrove's own examples string them together.
DATATROVE_FULL = """
import sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline import dedup, filters
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
folder, name, out, tokenizer = sys.argv[1:5]
def run(stage, *steps, tasks=1):
    logs = f"{out}/logs-{stage}"
    LocalPipelineExecutor(
        pipeline=list(steps), tasks=tasks, workers=1, logging_dir=logs, skip_completed=False).run()
run(1, JsonlReader(folder, glob_pattern=name), FTFYFormatter(), filters.C4QualityFilter(),
    filters.GopherRepetitionFilter(), filters.GopherQualityFilter(), filters.FineWebQualityFilter(),
    JsonlWriter(out + "/filtered", compression=None))
if not any(path.stat().st_size for path in Path(out, "filtered").glob("*")):
    sys.exit()  # the one document that measures the start may not pass
exact = ExactDedupConfig(content_getter=lambda document: document.text.encode())
run(2, JsonlReader(out + "/filtered"), dedup.ExactDedupSignature(out + "/sig", config=exact))
run(3, dedup.ExactFindDedups(out + "/sig", out + "/dups", config=exact))
run(4, JsonlReader(out + "/filtered"), dedup.ExactDedupFilter(out + "/dups", config=exact),
    JsonlWriter(out + "/exact", compression=None))
minhash = dedup.MinhashConfig()
run(5, JsonlReader(out + "/exact"), dedup.MinhashDedupSignature(out + "/minhash", config=minhash))
run(6, dedup.MinhashDedupBuckets(out + "/minhash", out + "/buckets", config=minhash), tasks=minhash.num_buckets)
run(7, dedup.MinhashDedupCluster(out + "/buckets", out + "/remove", config=minhash))
run(8, JsonlReader(out + "/exact"), dedup.MinhashDedupFilter(out + "/remove"), MegatronDocumentTokenizer(
    output_folder=out + "/tokens", tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token="<|endoftext|>"))
"""

FULL_CORPUS = {
    "clean": {"unicode": True, "whitespace": True, "c4_lines": True},
    "filters": {"c4": True, "gopher_repetition": True, "gopher_quality": True, "fineweb": True},
    "dedup": {"exact": True, "near": True},
}


# The document that measures a start; it passes the filters of FULL_CORPUS.
ONE_DOCUMENT = (
    "The committee met on Tuesday to review the plan that the council had approved in the spring of last year. "
    "Members of the public were invited to speak, and several of them asked about the cost of the new bridge. "
    "An engineer explained that the foundations would have to be deeper than anyone had expected at first. "
    "The mayor replied that a cheaper design was being studied and would be shown before the summer. "
    "After a long discussion the chair thanked everyone with a smile and closed the meeting before sunset."
)


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
    slow: bool  # gets the first --slow-mb only
    python: str
    arguments: tuple[str, ...]  # {input}, {folder}, {file} and {output} stand for paths
    environment: dict[str, str]
    corpus: dict[str, Any] | None = None  # written as {yaml}, with its source and output

    def run(self, file: Path, output: Path) -> Measurement:
        output.parent.mkdir(parents=True, exist_ok=True)
        description = output.with_suffix(".yaml")
        if self.corpus is not None:
            sources = {"output_prefix": str(output), "sources": [{"files": str(file)}]}
            description.write_text(json.dumps(self.corpus | sources))
        values = {
            "{yaml}": str(description),
            "{input}": str(file),
            "{folder}": str(file.parent),
            "{file}": file.name,
            "{output}": str(output),
        }
        command = [self.python, *(values.get(argument, argument) for argument in self.arguments)]
        return measure(command, {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | self.environment)


CLI = ("-c", "from megatron_cpt.cli import main; main()", "preprocess", "--overwrite", "--workers", "1")


def tokenising_tools(tokenizer: str, megatron_lm: str | None, peers_python: str | None) -> list[Tool]:
    ours = (*CLI, "--input", "{input}", "--output-prefix", "{output}", "--tokenizer", tokenizer)
    chosen = [
        Tool("megatron-cpt", False, sys.executable, ours, {}),
        Tool("tokenisation free", False, sys.executable, ("-c", FREE, "{input}", "{output}", tokenizer), {}),
    ]
    if megatron_lm:
        python = peers_python or sys.executable
        flags = [
            "--input",
            "{input}",
            "--output-prefix",
            "{output}",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--append-eod",
        ]
        flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
        path = {"PYTHONPATH": os.pathsep.join([megatron_lm, os.environ.get("PYTHONPATH", "")])}
        script = f"{megatron_lm}/tools/preprocess_data.py"
        chosen.append(Tool("Megatron-LM preprocess_data.py", True, python, (script, *flags, "--workers", "1"), path))
        fast = f"{megatron_lm}/tools/preprocess_data_fast.py"
        if Path(fast).exists():
            one_thread = path | {"RAYON_NUM_THREADS": "1"}
            chosen.append(Tool("Megatron-LM gigatoken", False, python, (fast, *flags, "--use-gigatoken"), one_thread))
    if peers_python:
        arguments = ("-c", DATATROVE, "{folder}", "{file}", "{output}", tokenizer)
        chosen.append(Tool("datatrove", True, peers_python, arguments, {}))
    return chosen


def full_tools(tokenizer: str, peers_python: str | None) -> list[Tool]:
    corpus = FULL_CORPUS | {"tokenizer": tokenizer}
    chosen = [Tool("megatron-cpt", False, sys.executable, (*CLI, "{yaml}"), {}, corpus)]
    if peers_python:
        arguments = ("-c", DATATROVE_FULL, "{folder}", "{file}", "{output}", tokenizer)
        chosen.append(Tool("datatrove", True, peers_python, arguments, {}))
    return chosen


@dataclass(frozen=True)
class Speed:
    """What a tool needs for its start, and for a megabyte after it."""

    start_cpu_seconds: float
    cpu_seconds_per_mb: float

    def whole(self, megabytes: float) -> float:
        return self.start_cpu_seconds + megabytes * self.cpu_seconds_per_mb


Ratios = dict[str, dict[str, float]]  # tool -> how many times faster ours is, net and whole


def compare(chosen: Sequence[Tool], source: Path, work: Path, slow_mb: float, repeats: int) -> Ratios:
    """Run all tools in turns on one corpus; print one JSON object per tool."""
    (work / "slow").mkdir(exist_ok=True)
    (work / "one").mkdir(exist_ok=True)
    slow = cut(source, work / "slow" / "in.jsonl", int(slow_mb * 1_000_000))
    one = work / "one" / "in.jsonl"
    one.write_text(json.dumps({"text": ONE_DOCUMENT}) + "\n")
    runs: dict[str, list[Measurement]] = {}
    starts: dict[str, list[float]] = {}
    for repeat in range(repeats):
        for tool in chosen:
            file, name = slow if tool.slow else source, re.sub(r"\W+", "-", tool.name)
            runs.setdefault(tool.name, []).append(tool.run(file, work / "out" / f"{name}-{repeat}"))
            starts.setdefault(tool.name, []).append(tool.run(one, work / "out" / f"{name}-{repeat}-one").cpu_seconds)
        shutil.rmtree(work / "out", ignore_errors=True)
    all_mb = source.stat().st_size / 1e6
    ours: Speed | None = None
    ratios: Ratios = {}
    for tool in chosen:
        megabytes = (slow if tool.slow else source).stat().st_size / 1e6
        cpu, start = statistics.median(m.cpu_seconds for m in runs[tool.name]), statistics.median(starts[tool.name])
        speed = Speed(start, max(cpu - start, 1e-3) / megabytes)
        ours = ours or speed
        ratios[tool.name] = {
            "net": round(speed.cpu_seconds_per_mb / ours.cpu_seconds_per_mb, 2),
            "whole": round(speed.whole(all_mb) / ours.whole(all_mb), 2),
        }
        fields = {
            "corpus": source.name,
            "tool": tool.name,
            "mb": round(megabytes, 1),
            "cpu_seconds": round(cpu, 2),
            "start_cpu_seconds": round(start, 2),
            "mb_per_cpu_second_net": round(1 / speed.cpu_seconds_per_mb, 2),
            "ours_is_net": ratios[tool.name]["net"],
            "ours_is_whole": ratios[tool.name]["whole"],
            "wall_seconds": round(statistics.median(m.wall_seconds for m in runs[tool.name]), 1),
            "peak_mib": round(max(m.peak_mib for m in runs[tool.name])),
        }
        click.echo(json.dumps(fields))
    return ratios


def ranges(of_corpora: Sequence[Ratios]) -> dict[str, dict[str, list[float]]]:
    """Tool -> net and whole ratio, least and most over the corpora."""
    return {
        tool: {kind: [min(r[tool][kind] for r in of_corpora), max(r[tool][kind] for r in of_corpora)] for kind in kinds}
        for tool, kinds in of_corpora[0].items()
    }


def grow(source: Path, target: Path, size_bytes: int) -> int:
    """Repeat `source` with other digits each time, as zstd or plain by the name of `target`; returns bytes of text."""
    written = 0
    with target.open("wb") as raw:
        out = zstandard.ZstdCompressor(1).stream_writer(raw, closefd=False) if target.suffix == ".zst" else raw
        for turn in itertools.count():
            table = bytes.maketrans(b"123456789", bytes((digit + turn) % 9 + 49 for digit in range(9)))
            with source.open("rb") as lines:
                for line in lines:
                    out.write(line if b"\\u" in line else line.translate(table))
                    written += len(line)
                    if written >= size_bytes:
                        out.close()
                        return written
    raise AssertionError


def measure_memory(source: Path, tokenizer: str, work: Path, sizes_mb: Sequence[float], plain: bool) -> None:
    for megabytes in sizes_mb:
        file = work / ("grown.jsonl" if plain else "grown.jsonl.zst")
        size = grow(source, file, int(megabytes * 1e6))
        flags = ("--input", str(file), "--output-prefix", str(work / "out" / "memory"), "--tokenizer", tokenizer)
        result = measure((sys.executable, *CLI[:-1], "2", *flags), {"OMP_NUM_THREADS": "1"})
        fields = {
            "mb": round(size / 1e6), "file_mb": round(file.stat().st_size / 1e6), "peak_mib": round(result.peak_mib),
            "cpu_seconds": round(result.cpu_seconds, 1), "wall_seconds": round(result.wall_seconds, 1),
        }  # fmt: skip
        click.echo(json.dumps(fields))
        file.unlink()
        shutil.rmtree(work / "out")


@click.command()
@click.argument("mode", type=click.Choice(["tokenise", "full", "memory"]))
@click.option(
    "--input",
    "sources",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="jsonl with `text`; may be given several times.",
)
@click.option("--tokenizer", required=True, help="Model folder with tokenizer.json.")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for outputs.")
@click.option("--megatron-lm", help="Checkout of NVIDIA/Megatron-LM.")
@click.option("--peers-python", help="A Python with the peers' packages.")
@click.option("--slow-mb", default=20.0, show_default=True, help="MB given to slow peers.")
@click.option("--repeats", default=3, show_default=True, help="Interleaved runs; the median is printed.")
@click.option("--sizes-mb", default="100,1000,5000", show_default=True, help="memory: MB of text.")
@click.option("--plain", is_flag=True, help="memory: jsonl, not jsonl.zst (needs more disk).")
def main(
    mode: str,
    sources: tuple[Path, ...],
    tokenizer: str,
    work: Path,
    megatron_lm: str | None,
    peers_python: str | None,
    slow_mb: float,
    repeats: int,
    sizes_mb: str,
    plain: bool,
) -> None:
    """Print one JSON object per tool or size: MB, CPU-seconds, MB per CPU-second, peak memory."""
    work.mkdir(parents=True, exist_ok=True)
    work, tokenizer = work.resolve(), str(Path(tokenizer).resolve())
    if mode == "memory":
        measure_memory(sources[0].resolve(), tokenizer, work, [float(size) for size in sizes_mb.split(",")], plain)
        return
    of_corpora = []
    for source in map(Path.resolve, sources):
        if mode == "full":
            chosen = full_tools(tokenizer, peers_python)
        else:
            chosen = tokenising_tools(tokenizer, megatron_lm, peers_python)
        of_corpora.append(compare(chosen, source, work, slow_mb, repeats))
    click.echo(json.dumps({"ours_is": ranges(of_corpora)}))


if __name__ == "__main__":
    main()
