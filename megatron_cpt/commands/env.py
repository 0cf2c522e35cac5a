"""`megatron-cpt env`: what is installed here, what that makes possible, and what would stop a run."""

from __future__ import annotations

import json

import click

from megatron_cpt.launch.environment import PACKAGES, Environment, read_environment


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def env(as_json: bool) -> int:
    """Show versions, devices, what is available here and what is missing. Paste it into a bug report.

    Exit code 0, or 1 when a run would be refused here; the problems and what to do about them come last.
    """
    found = read_environment()
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else _text(found))
    return 1 if found.problems else 0


def _text(found: Environment) -> str:
    lines = [
        f"megatron-cpt {found.megatron_cpt}, Python {found.python} ({found.executable})",
        f"{found.platform}, {found.cpus} CPUs, {found.memory_bytes / 2**30:.0f} GiB of memory",
        "packages",
    ]
    for name, version in found.packages.items():
        lines.append(f"  {name:<22} {version or '-':<16} {PACKAGES[name]}")
    lines += ["devices", *_devices(found)]
    lines += [f"Megatron-Core at {folder}" for folder in found.megatron_core_folders]
    lines += ["available", *(f"  {feature}" for feature in found.available)]
    if found.missing:
        lines += ["missing", *(f"  {feature}: {how}" for feature, how in found.missing.items())]
    if found.variables:
        lines += ["environment variables", *(f"  {name}={value}" for name, value in found.variables.items())]
    for problem in found.problems:
        lines += [f"problem: {problem.what}", f"hint: {problem.hint}"]
    return "\n".join(lines if found.problems else [*lines, "no problem found"])


def _devices(found: Environment) -> list[str]:
    if found.torch is None:
        return ["  unknown: torch does not run here"]
    build = f"CUDA {found.torch['cuda']}" if found.torch["cuda"] else "the CPU"
    gpus = [
        f"  {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability {gpu['compute_capability']}"
        for gpu in found.torch["gpus"]
    ]
    shown = f", {found.nvidia_gpus} that the driver shows" if found.nvidia_gpus != len(gpus) else ""
    return [f"  {len(gpus)} GPUs{shown}; torch {found.torch['version']} is built for {build}", *gpus]
