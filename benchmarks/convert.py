"""Time, memory and exactness of checkpoint conversion, as ratios to `cp` and to transformers in the same run.

    python benchmarks/convert.py --parts abcd --work /scratch/bench

a  HF -> torch_dist (TP8 PP4) -> HF of a random Qwen2-7B-shaped model (--model), against `cp` of the same bytes
b  HF -> HF against transformers' from_pretrained + save_pretrained (--peer-model)
c  Qwen2-72B: the dry-run plan, and all its tensors at their true shapes from HF to torch_dist TP8; source files
   are generated when they are needed, output files verified, and both deleted
d  round trips of all families, TP 1/2/4/8 x PP 1/2/4, tied and untied, padded vocabulary

Prints Markdown. Files are evicted from the page cache before each measured stage. Disk: a needs 3 x the model (46 GB
for 7b), b 2 x, c 17 GB; what a part wrote is deleted when it ends or fails.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_convert.checkpoint import IndexedCheckpoint, StoredTensor, Weights
from checkpoint_convert.convert import Options, convert, plan
from checkpoint_convert.hf import plan_hf, read_hf
from checkpoint_convert.open import open_checkpoint
from checkpoint_convert.rows import Files, write_rows
from checkpoint_convert.stream import Copier, run_parallel
from checkpoint_convert.target import Target
from megatron_cpt.architecture.families import FAMILIES, architecture_from_config
from megatron_cpt.architecture.tensors import hf_tensor_shapes

GB, GIB = 1e9, 2**30
STREAM_FILE_BYTES = 4 * 10**9  # of part c


def qwen2(hidden: int, layers: int, heads: int, groups: int, ffn: int, vocab: int, tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocab}
    rest = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "hidden_act": "silu"}
    names = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"}
    return {**names, **sizes, **rest, "tie_word_embeddings": tied}


MODELS = {
    "0.5b": qwen2(896, 24, 14, 2, 4864, 151936, True),
    "1.5b": qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "7b": qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "72b": qwen2(8192, 80, 64, 8, 29568, 152064, False),
}


@dataclass
class Measured:
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def measure(command: list[str], log: Path) -> Measured:
    """Run a command; wall time including its fsync, peak resident and peak anonymous memory of the process.

    Not ru_maxrss: the kernel lets a child start with the peak of the process that forked it.
    """
    start, over = time.monotonic(), threading.Event()
    peak = {"VmHWM": 0, "RssAnon": 0}
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)

        def watch() -> None:
            while not over.wait(0.02):
                try:
                    text = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    return
                for name, value in (line.split(":", 1) for line in text.splitlines()):
                    if name in peak:
                        peak[name] = max(peak[name], int(value.split()[0]) * 1024)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        over.set()
        watcher.join()
    if status:
        raise SystemExit(f"failed: {' '.join(command)}; see {log}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak["VmHWM"], peak["RssAnon"])


def evict(place: Path) -> None:
    """Write a file or folder to disk and drop it from the page cache."""
    for path in [place, *place.rglob("*")]:
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def check_disk(work: Path, need_bytes: float) -> None:
    free = shutil.disk_usage(work).free
    if free < need_bytes:
        raise SystemExit(f"{work} has {free / GB:.0f} GB free, this part needs {need_bytes / GB:.0f}")


def write_random_hf(folder: Path, config: dict[str, Any], *, shard_bytes: int = 5 * 10**9) -> Path:
    """A Hugging Face folder of random finite bf16 weights, written block by block."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    arch = architecture_from_config(config)
    target = plan_hf(folder, arch, dict.fromkeys(hf_tensor_shapes(arch), "bfloat16"), shard_bytes)
    target.allocate()
    generator = np.random.default_rng(0)
    with Files(write=True) as files:
        for tensor in target.tensors.values():
            step = max(1, 2**25 // tensor.row_bytes)
            for start in range(0, tensor.rows, step):
                rows = min(step, tensor.rows - start)
                bits = generator.integers(0, 2**16, (rows, tensor.columns), dtype=np.uint16)
                write_rows(files, tensor, start, ((bits & 0x83FF) | 0x3C00).view(np.uint8))
    for path, data in target.small_files.items():
        path.write_bytes(data)
    return folder


def convert_command(*args: object) -> list[str]:
    return [sys.executable, "-m", "checkpoint_convert", *map(str, args)]


def measure_copy(source: Path, work: Path, log: Path) -> Measured:
    target = work / "cp"
    evict(source)
    found = measure(["sh", "-c", f"cp -r {source} {target} && sync {target}/*"], log)
    shutil.rmtree(target)
    return found


def model_bytes(model: str) -> int:
    return 2 * architecture_from_config(MODELS[model]).num_parameters


def part_a(work: Path, log: Path, model: str, tp: int, pp: int, repeats: int) -> list[str]:
    source, middle, back = work / "hf", work / "td", work / "back"
    check_disk(work, 3.2 * model_bytes(model))
    write_random_hf(source, MODELS[model])
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    largest = max(t.nbytes for t in open_checkpoint(source).weights.tensors.values())
    rows = [f"### (a) {model}, {size / GB:.1f} GB bf16, largest tensor {largest / GIB:.2f} GiB, TP{tp} PP{pp}", ""]
    rows += ["| run | stage | s | `cp` + sync, s | ratio | CPU s | CPU s of `cp` | peak RSS, GiB | of it anonymous |"]
    rows += ["|---|---|---|---|---|---|---|---|---|"]
    for run in range(1, repeats + 1):
        for stage, a, b, flags in (
            ("HF -> torch_dist", source, middle, ("--to", "torch_dist", "--tp", tp, "--pp", pp)),
            ("torch_dist -> HF", middle, back, ("--to", "hf")),
        ):
            copied = measure_copy(a, work, log)
            evict(a)
            found = measure(convert_command(a, b, *flags), log)
            ratio = found.seconds / copied.seconds
            rows.append(
                f"| {run} | {stage} | {found.seconds:.0f} | {copied.seconds:.0f} | {ratio:.2f} | "
                f"{found.cpu_seconds:.0f} | {copied.cpu_seconds:.0f} | "
                f"{found.peak_rss_bytes / GIB:.2f} | {found.peak_anonymous_bytes / GIB:.2f} |"
            )
            if stage == "torch_dist -> HF":
                prints = [
                    json.loads((p / "conversion.json").read_text())["target"]["fingerprint"] for p in (middle, back)
                ]
                shutil.rmtree(middle)
                check = measure(convert_command("verify", source, back, "--no-logits"), log)
                memory = f"{check.peak_rss_bytes / GIB:.2f} | {check.peak_anonymous_bytes / GIB:.2f}"
                rows.append(f"| {run} | verify | {check.seconds:.0f} | | | {check.cpu_seconds:.0f} | | {memory} |")
                assert prints[0] == prints[1]
                shutil.rmtree(back)
    shutil.rmtree(source)
    return rows


def part_b(work: Path, log: Path, model: str, repeats: int) -> list[str]:
    check_disk(work, 2.2 * model_bytes(model))
    source = write_random_hf(work / "hf", MODELS[model])
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    peer = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        "A.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2]); import os, glob; "
        "[os.fsync(os.open(path, os.O_RDONLY)) for path in glob.glob(sys.argv[2] + '/*')]"
    )
    rows = [f"### (b) {model}, {size / GB:.1f} GB bf16, HF -> HF", ""]
    rows += ["| run | tool | s | CPU s | peak RSS, GiB |", "|---|---|---|---|---|"]
    for run in range(1, repeats + 1):
        for tool, command in (
            ("transformers", [sys.executable, "-c", peer, str(source), str(work / "out")]),
            ("convert", convert_command(source, work / "out", "--to", "hf")),
        ):
            evict(source)
            found = measure(command, log)
            rows.append(
                f"| {run} | {tool} | {found.seconds:.1f} | {found.cpu_seconds:.1f} | {found.peak_rss_bytes / GIB:.2f} |"
            )
            shutil.rmtree(work / "out")
    shutil.rmtree(source)
    return rows


def part_c(work: Path, log: Path, workers: int, layers: int) -> list[str]:
    """The plan from config.json alone, then every tensor streamed through files that exist."""
    check_disk(work, 20e9)
    folder = work / "config"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODELS["72b"]))
    dry = measure(
        convert_command(folder, work / "td", "--to", "torch_dist", "--tp", 8, "--pp", 4, "--dry-run", "--json"), log
    )
    run = [sys.executable, __file__, "--parts", "stream72b", "--work", str(work), "--workers", str(workers)]
    run += ["--layers", str(layers)]
    out = work / "stream72b.json"
    found = measure(run, log)
    result = json.loads(out.read_text())
    shutil.rmtree(folder)
    return [
        "### (c) Qwen2-72B on this machine",
        "",
        f"- dry run from config.json: {dry.seconds:.1f} s, {dry.peak_rss_bytes / GIB:.2f} GiB",
        f"- {layers} of its 80 layers: {result['bytes'] / GB:.1f} GB in {result['tensors']} tensors through "
        f"{result['files']} files, HF -> torch_dist TP8: "
        f"{result['convert_seconds']:.0f} s to convert and {result['verify_seconds']:.0f} s to read back "
        f"({found.seconds:.0f} s with making the source), **peak RSS {found.peak_rss_bytes / GIB:.2f} GiB** "
        f"(anonymous {found.peak_anonymous_bytes / GIB:.2f}); largest tensor {result['largest_bytes'] / GIB:.2f} GiB; "
        f"{workers} workers; {result['verified']} tensors read back bit-exact; "
        f"at most {result['peak_disk'] / GB:.1f} GB on disk",
    ]


def stream_72b(work: Path, workers: int, layers: int) -> None:
    """Qwen2-72B from safetensors to torch_dist, file by file: made, converted, read back, deleted."""
    config = MODELS["72b"] | {"num_hidden_layers": layers}
    arch = architecture_from_config(config)
    made = plan_hf(work / "hf", arch, dict.fromkeys(hf_tensor_shapes(arch), "bfloat16"), STREAM_FILE_BYTES)
    source = IndexedCheckpoint("hf", made.folder, arch, config, work, Weights(made.tensors))
    options = Options(to="torch_dist", tp=8, pp=4, workers=workers, max_shard_bytes=STREAM_FILE_BYTES)
    target = plan(source, work / "td", options)
    places = {name: {e.path for e in tensor.extents} for name, tensor in target.tensors.items()}
    sources = {name: tensor.extents[0].path for name, tensor in made.tensors.items()}
    waiting, done, there = dict(places), set[Path](), set[Path]()
    hashes: dict[str, str] = {}
    seconds = {"convert": 0.0, "verify": 0.0}
    peak_disk = 0
    noise = np.random.default_rng(0).integers(0, 2**16, 2**25, dtype=np.uint16) & 0x83FF | 0x3C00
    for path in target.file_bytes:
        here = [name for name, paths in waiting.items() if path in paths]
        for needed in sorted({sources[name] for name in here} - there):
            make_source(made, needed, noise)
            there.add(needed)
        start = time.monotonic()
        allocate(target, path)
        with Files() as reading, Files(write=True) as writing:
            copier = Copier(reading, writing, lambda count: None)
            parts = [only(target.tensors[name], path) for name in here]
            jobs = [functools.partial(copier.copy, made.tensors[part.name], part) for part in parts]
            for record in run_parallel(jobs, workers):
                assert hashes.setdefault(record.name, record.sha256) == record.sha256
            writing.fsync()
        done.add(path)
        seconds["convert"] += time.monotonic() - start
        peak_disk = max(peak_disk, sum(p.stat().st_size for p in work.rglob("*") if p.is_file()))
        evict(path)
        start = time.monotonic()
        with Files() as files:
            reader = Copier(files, None, lambda count: None)
            whole = [name for name in here if waiting[name] <= done]
            checks = [functools.partial(reader.sha256, target.tensors[name]) for name in whole]
            assert run_parallel(checks, workers) == [hashes[name] for name in whole]
        seconds["verify"] += time.monotonic() - start
        for name in whole:
            del waiting[name]
        for old in {*done, *there} - {p for name in waiting for p in (*places[name], sources[name])}:
            old.unlink(missing_ok=True)
    assert not waiting and len(set(hashes.values())) == len(hashes) == len(made.tensors)
    report: dict[str, float] = {
        "bytes": target.nbytes,
        "tensors": len(hashes),
        "files": len(target.file_bytes),
        "verified": len(hashes),
    }
    report |= {"largest_bytes": max(t.nbytes for t in made.tensors.values()), "peak_disk": peak_disk}
    report |= {f"{name}_seconds": value for name, value in seconds.items()}
    (work / "stream72b.json").write_text(json.dumps(report))


def only(tensor: StoredTensor, path: Path) -> StoredTensor:
    return replace(tensor, extents=tuple(e for e in tensor.extents if e.path == path))


def allocate(target: Target, path: Path) -> None:
    skeleton = [piece for piece in target.skeleton if piece[0] == path]
    Target(target.folder, file_bytes={path: target.file_bytes[path]}, skeleton=skeleton).allocate()


def make_source(made: Target, path: Path, noise: Any) -> None:
    """One safetensors file; each block of each tensor is another part of the noise."""
    allocate(made, path)
    with Files(write=True) as files:
        for number, tensor in enumerate(made.tensors.values()):
            if tensor.extents[0].path != path:
                continue
            step = max(1, 2**23 // tensor.row_bytes)
            for start in range(0, tensor.rows, step):
                count = min(step, tensor.rows - start) * tensor.columns
                low = (number * 7919 + start * 104729) % (len(noise) - count)
                block = noise[low : low + count].view(np.uint8).reshape(-1, tensor.row_bytes)
                write_rows(files, tensor, start, block)
    evict(path)


def part_d(work: Path) -> list[str]:
    start, count = time.monotonic(), 0
    for family, tied, (tp, pp), fmt in itertools.product(
        FAMILIES, (False, True), itertools.product((1, 2, 4, 8), (1, 2, 4)), ("torch_dist", "legacy")
    ):
        config = qwen2(64, 4, 8, 8, 96, 509, tied) | {"model_type": family, "head_dim": 8, "sliding_window": None}
        config["architectures"] = [FAMILIES[family].hf_class]
        source = write_random_hf(work / "hf", config)
        convert(open_checkpoint(source), work / "there", Options(to=fmt, tp=tp, pp=pp))  # type: ignore[arg-type]
        convert(open_checkpoint(work / "there"), work / "back", Options(to="hf"))
        arch = architecture_from_config(config)
        with Files() as files:
            copier = Copier(files, None, lambda n: None)
            a, b = (read_hf(folder, arch).tensors for folder in (source, work / "back"))
            assert all(copier.sha256(a[name]) == copier.sha256(b[name]) for name in a)
        count += 1
        for name in ("hf", "there", "back"):
            shutil.rmtree(work / name)
    return [
        "### (d) Round trips",
        "",
        f"{count} of {count} bit-exact: {len(FAMILIES)} families x tied/untied x TP 1/2/4/8 x PP 1/2/4 x "
        f"torch_dist/legacy, vocabulary 509 padded whenever TP > 1 ({time.monotonic() - start:.0f} s).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="abcd")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument("--model", choices=MODELS, default="7b", help="of part a")
    parser.add_argument("--tp", type=int, default=8, help="of part a; any that divides the rows")
    parser.add_argument("--peer-model", choices=MODELS, default="1.5b", help="of part b")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=80, help="of part c")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    log = args.work / "log.txt"
    if args.parts == "stream72b":
        stream_72b(args.work, args.workers, args.layers)
        return
    parts: dict[str, Callable[[Path], list[str]]] = {
        "a": lambda work: part_a(work, log, args.model, args.tp, 4, args.repeats),
        "b": lambda work: part_b(work, log, args.peer_model, args.repeats),
        "c": lambda work: part_c(work, log, args.workers, args.layers),
        "d": part_d,
    }
    for part in args.parts:
        work = args.work / f"part-{part}"
        shutil.rmtree(work, ignore_errors=True)  # of a killed run
        work.mkdir()
        try:
            print("\n".join(parts[part](work)), end="\n\n", flush=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
