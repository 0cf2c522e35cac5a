"""slurm/cluster.env, read as the shell reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.slurm.site import read_site

REPO = Path(__file__).resolve().parents[3]


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.env"
    path.write_text(text)
    return path


def test_exported_and_plain_values_are_read_as_the_shell_reads_them(tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    image.touch()
    text = f'export SBATCH_PARTITION="gpu"\nSBATCH_ACCOUNT=a$((1 + 1))\nBASE={tmp_path}\n'
    text += "CONTAINER_IMAGE=$BASE/image.sqsh\n"
    site = read_site(write(tmp_path, text))
    assert (site.partition, site.account, site.container_image) == ("gpu", "a2", str(image))
    assert dict(site.directives()) == {"account": "a2", "partition": "gpu"}
    assert site.environment["BASE"] == str(tmp_path)


def test_without_a_file_the_clusters_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_site(None).directives() == []


def test_the_example_can_be_read() -> None:
    site = read_site(REPO / "slurm/cluster.env.example")
    assert (site.account, site.partition) == ("my-account", "gpu")
    assert site.environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CONTAINER_IMAGE=/nowhere/image.sqsh\n", "CONTAINER_IMAGE=/nowhere/image.sqsh in .* does not exist"),
        ("if true; then\n", "is not a shell file"),
        ("export A='unclosed\n", "is not a shell file"),
    ],
)
def test_a_faulty_file_is_one_clear_error(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(LaunchError, match=words) as caught:
        read_site(write(tmp_path, text))
    assert caught.value.exit_code == 2 and caught.value.hint


def test_an_image_of_a_registry_is_not_looked_for_on_the_disk(tmp_path: Path) -> None:
    assert read_site(write(tmp_path, "CONTAINER_IMAGE=nvcr.io#nvidia/pytorch:25.09-py3\n")).container_image


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="does not exist"):
        read_site(tmp_path / "other.env")
