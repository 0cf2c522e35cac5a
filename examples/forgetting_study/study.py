"""What helps against forgetting, in numbers: one small real model, nine ways to train it and two to average it.

    python examples/forgetting_study/study.py [--size 135m|tiny] [--seeds 2] [--jobs 2] [--only vanilla,replay_25]

Every step is a command of this project, printed before it runs. What is finished is skipped, and a run that was
stopped goes on where it was, so the study may be stopped and started again. All it makes lies under .study/SIZE;
the table and the picture are results.md, results.html and results.png there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
import assets
import results
import texts
from settings import AVERAGES, FISHER_SAMPLES, SETTINGS, VANILLA, Average, Setting, overrides_of, run_folder

from megatron_cpt.cli import run
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import ConfigError, CptError
from megatron_cpt.runs.comparison import validation_changes
from megatron_cpt.runs.metrics import read_metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CPT = [sys.executable, "-m", "megatron_cpt"]
# Held-out shares that give some 4,000 tokens; the other two texts are measured whole.
SPLITS = {"medical": "train=0.996,valid=0.004", "facts": "train=0.993,valid=0.007", "reference": None, "fiction": None}
SEQ_LENGTH = {"135m": 256, "tiny": 64}
STEP_SAMPLES = 2  # batch.global_batch_size of config.yaml
TINY = ("batch.seq_length=64", "optimizer.lr=3e-3", "optimizer.min_lr=3e-4")


class Study:
    """The steps of the study in one folder."""

    def __init__(self, size: str, jobs: int) -> None:
        self.size, self.jobs = size, jobs
        self.work = Path(".study") / size
        self.config = self.work / "config.yaml"
        self.console = Console(stderr=True)
        self.step_tokens = STEP_SAMPLES * SEQ_LENGTH[size]

    def prepare(self, *, with_fisher: bool) -> None:
        """The model, the texts, the datasets and the importance of each weight for general text."""
        downloads = Path(".quickstart/downloads")
        for folder in (self.work, downloads):
            folder.mkdir(parents=True, exist_ok=True)
        if not (self.work / "model").exists():
            assets.make_model(self.size, downloads, self.work)
        folder = self.work / "texts"
        texts.write_texts(folder, downloads)
        for name, split in SPLITS.items():
            prefix = self.work / "data" / name
            if not Path(f"{prefix}{'_valid' if split else ''}.manifest.json").exists():
                self.command(
                    "preprocess", "--input", f"{folder / name}.jsonl", "--output-prefix", str(prefix),
                    "--tokenizer", str(self.work / "model"), *(["--split", split] if split else []),
                )  # fmt: skip
        text = (HERE / "config.yaml").read_text(encoding="utf-8")
        write_atomically(self.config, text.replace(".study/135m", str(self.work)).encode())
        if with_fisher and not (self.work / "fisher").exists():
            self.command(
                "fisher", str(self.config), *self.size_overrides, "--data", str(self.work / "data/facts_train"),
                "--to", str(self.work / "fisher"), "--samples", str(FISHER_SAMPLES),
            )  # fmt: skip

    @property
    def size_overrides(self) -> tuple[str, ...]:
        return TINY if self.size == "tiny" else ()

    def train(self, setting: Setting, seed: int) -> results.Row:
        """One run; its checkpoint is kept where an average needs it."""
        changes = overrides_of(setting, seed, str(self.work), self.step_tokens)
        folder = Path(run_folder(str(self.work), setting.name, seed))
        started = time.monotonic()
        self.command("train", str(self.config), *self.size_overrides, *changes, log=folder.with_suffix(".log"))
        rows = read_metrics(folder / "metrics.jsonl")
        measured = validation_changes(rows)
        steps = [row for row in rows if "event" not in row]
        if not any(average.of == setting.name for average in AVERAGES):
            shutil.rmtree(folder / "checkpoints")
        return results.Row(
            name=setting.name,
            title=setting.title,
            seed=seed,
            domain_tokens=steps[-1]["tokens_by_source"]["medical"],
            train_tokens=steps[-1]["consumed_tokens"],
            before={name: change.first for name, change in measured.items() if change.first is not None},
            after={name: change.last for name, change in measured.items() if change.last is not None},
            seconds=round(time.monotonic() - started, 1),
        )

    def average(self, average: Average, trained: results.Row) -> results.Row:
        """Weights between the base's and those of a run."""
        source = run_folder(str(self.work), average.of, trained.seed)
        target = self.work / "averages" / f"{average.name}_seed{trained.seed}"
        started = time.monotonic()
        log = target.with_suffix(".log")
        self.command("interpolate", source, str(target), "--ratio", str(average.ratio), "--overwrite", log=log)
        data = [word for name in trained.before for word in ("--data", self._measured(name))]
        told = self.command(
            "eval", "perplexity", str(target), *data, "--seq-length", str(SEQ_LENGTH[self.size]), "--json", log=log
        )
        shutil.rmtree(target)
        losses = {Path(row["data"]).name: row["loss"] for row in json.loads(told)["results"]}
        return replace(
            trained,
            name=average.name,
            title=average.title,
            after={name: losses[Path(self._measured(name)).name] for name in trained.before},
            seconds=round(time.monotonic() - started, 1),
        )

    def _measured(self, name: str) -> str:
        return str(self.work / "data" / (f"{name}_valid" if SPLITS[name] else name))

    def command(self, *words: str, log: Path | None = None) -> str:
        """Run one command of this project and return its standard output.

        Raises:
            CptError: it failed; the error says where its messages are.
        """
        self.console.print(f"$ megatron-cpt {' '.join(words)}", highlight=False, markup=False, soft_wrap=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        if log is None:
            done = subprocess.run([*CPT, *words], env=environment, stdout=subprocess.PIPE, text=True, check=False)
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as sink:
                done = subprocess.run(
                    [*CPT, *words], env=environment, stdout=subprocess.PIPE, stderr=sink, text=True, check=False
                )
        if done.returncode:
            where = f"its messages are in {log}" if log else "its messages stand above"
            raise CptError(
                f"megatron-cpt {words[0]} ended with exit code {done.returncode}",
                hint=f"{where}; the same command continues here once that is fixed",
            )
        return done.stdout


def run_all(study: Study, settings: Sequence[Setting], seeds: Sequence[int]) -> None:
    """Train what is not in results.json yet, `jobs` runs at a time, the first seed of all settings first."""
    path = study.work / "results.json"
    rows = {(row.name, row.seed): row for row in results.read(path)}

    def keep(row: results.Row) -> None:
        rows[row.name, row.seed] = row
        results.write(path, list(rows.values()))

    wanted = [(setting, seed) for seed in seeds for setting in settings if (setting.name, seed) not in rows]
    with ThreadPoolExecutor(study.jobs) as pool:
        running = [pool.submit(study.train, setting, seed) for setting, seed in wanted]
        try:
            for number, done in enumerate(as_completed(running), 1):
                keep(row := done.result())
                study.console.print(f"[{number}/{len(wanted)}] {row.title}, seed {row.seed}: {row.seconds:,.0f} s")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for average in AVERAGES:
        for seed in seeds:
            if (average.name, seed) not in rows and (average.of, seed) in rows:
                keep(study.average(average, rows[average.of, seed]))
    order = [one.name for one in (*SETTINGS, *AVERAGES)]
    ranked = sorted(rows.values(), key=lambda row: (order.index(row.name), row.seed))
    results.show(study.work, ranked, Console())


@click.command()
@click.option("--size", type=click.Choice(list(SEQ_LENGTH)), default="135m", show_default=True)
@click.option("--seeds", type=click.IntRange(1, 9), default=2, show_default=True, help="Runs per setting.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Runs at a time.")
@click.option("--only", help="Names of settings, with commas between; default: all. vanilla is always among them.")
def main(size: str, seeds: int, jobs: int, only: str | None) -> None:
    """Train SmolLM2-135M on medical text in nine ways and measure what it forgets."""
    os.chdir(ROOT)
    names = {VANILLA.name, *(only.split(",") if only else [setting.name for setting in SETTINGS])}
    if unknown := names - {setting.name for setting in SETTINGS}:
        raise ConfigError(
            f"--only: no setting is called {', '.join(sorted(unknown))}",
            hint="settings are " + ", ".join(setting.name for setting in SETTINGS),
        )
    settings = [setting for setting in SETTINGS if setting.name in names]
    study = Study(size, jobs)
    study.prepare(with_fisher="ewc" in names)
    run_all(study, settings, range(1, seeds + 1))


if __name__ == "__main__":
    run(main, prog="study.py")
