"""Which Megatron-Core is used is known before anything starts, and one that is not proven is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch import engine
from megatron_cpt.launch.engine import CONSTRAINT, check_engine, installed_engines

REPO = Path(__file__).parents[3]
INFO = 'MAJOR = {}\nMINOR = {}\nPATCH = {}\nPRE_RELEASE = ""\nraise SystemExit("this file must not be run")\n'


def install(folder: Path, text: str) -> Path:
    """A Megatron-Core that only says its version, in a folder for sys.path."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text(text)
    return folder


def use(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    monkeypatch.setattr(engine.sys, "path", [str(folder) for folder in folders])
    monkeypatch.delitem(engine.sys.modules, "megatron", raising=False)


@pytest.mark.parametrize("version", [(0, 16, 0), (0, 16, 1), (0, 17, 1), (0, 18, 2), (0, 19, 2), (0, 19, 11)])
def test_a_proven_version_is_found_without_running_it(
    version: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, install(tmp_path, INFO.format(*version)))
    assert check_engine().version == version


@pytest.mark.parametrize("version", [(0, 15, 3), (0, 2, 0), (0, 20, 0), (0, 191, 0), (1, 16, 0), (1, 0, 0)])
def test_another_version_is_one_error_with_the_constraint_to_install(
    version: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, install(tmp_path, INFO.format(*version)))
    with pytest.raises(LaunchError, match="is proven with") as caught:
        check_engine()
    assert ".".join(map(str, version)) in caught.value.message
    assert caught.value.hint == f"pip install '{CONSTRAINT}'"


@pytest.mark.parametrize("text", ["", "MAJOR = 0\nMINOR = 16\n", "MAJOR = next\nMINOR = 16\nPATCH = 0\n"])
def test_a_version_that_cannot_be_read_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, install(tmp_path, text))
    with pytest.raises(LaunchError, match="unknown version"):
        check_engine()


def test_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path)
    with pytest.raises(LaunchError, match="not installed"):
        check_engine()


@pytest.mark.parametrize("versions", [((0, 16, 1), (0, 19, 2)), ((0, 16, 1), (0, 16, 1))])
def test_two_on_the_path_are_an_error_that_names_both(
    versions: tuple[tuple[int, int, int], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [install(tmp_path / str(number), INFO.format(*version)) for number, version in enumerate(versions)]
    use(monkeypatch, *folders)
    with pytest.raises(LaunchError, match="two Megatron-Cores") as caught:
        check_engine()
    assert all(str(folder) in caught.value.message for folder in folders)


def test_one_that_is_reached_in_two_ways_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(tmp_path / "lib", INFO.format(0, 16, 1))
    (tmp_path / "lib64").symlink_to(folder)
    use(monkeypatch, folder, tmp_path / "lib64", folder)
    assert len(installed_engines()) == 1


def test_what_pip_may_install_is_what_is_proven() -> None:
    dependencies = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [d for d in dependencies if d.startswith("megatron-core")] == [CONSTRAINT]
    first, last = engine.FIRST_PROVEN, engine.LAST_PROVEN
    assert f"megatron-core>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}" == CONSTRAINT
