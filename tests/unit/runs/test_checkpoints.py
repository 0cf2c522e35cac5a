from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.checkpoints import (
    LATEST,
    checkpoint_path,
    complete_checkpoints,
    faults,
    leave_shard_hashes,
    list_checkpoints,
    read_best,
    remove_checkpoint,
    remove_partials,
    seal,
    set_aside,
    update_best,
)
from megatron_cpt.runs.marker import MARKER, Marker


def marker(iteration: int = 5, tokens: int = 500, validation: dict[str, float] | None = None) -> Marker:
    return Marker(
        iteration=iteration,
        consumed_tokens=tokens,
        ledger={},
        layout={},
        optimizer_sharding="fully_reshardable",
        attempt=1,
        created="",
        versions={"megatron_cpt": "9.9"},
        validation=validation or {},
    )


def write(root: Path, iteration: int, tokens: int = 0, validation: dict[str, float] | None = None) -> Path:
    partial = root / f"iter_{iteration:07d}.partial-1"
    partial.mkdir(parents=True)
    for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp"):
        (partial / name).write_text(name * 10)
    leave_shard_hashes(partial, 0, ["__0_0.distcp", "__0_1.distcp"])
    final = checkpoint_path(root, iteration)
    seal(partial, final, "job_name: t\n", marker(iteration, tokens or 100 * iteration, validation))
    return final


@pytest.mark.parametrize("best", ["{}", "[1]", '{"iteration": "x", "name": "v", "value": 1}'])
def test_a_damaged_best_json_is_none(tmp_path: Path, best: str) -> None:
    (tmp_path / "best.json").write_text(best)
    assert read_best(tmp_path) is None


def test_a_checkpoint_set_aside_is_out_of_the_list_and_abandoned(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    aside = set_aside(first)
    assert aside.is_dir() and [path for path, _ in complete_checkpoints(tmp_path)] == [second]
    assert remove_partials(tmp_path) == 1 and not aside.exists()


def test_a_sealed_checkpoint_counts_and_is_latest(tmp_path: Path) -> None:
    for iteration in (5, 10):
        write(tmp_path, iteration)
    assert [marker.iteration for _, marker in complete_checkpoints(tmp_path)] == [10, 5]
    assert (tmp_path / LATEST).read_text() == "10\n"
    path, sealed = complete_checkpoints(tmp_path)[0]
    assert faults(path, sealed) == []
    assert set(sealed.sha256) == {".metadata", "common.pt", "metadata.json", "resolved.yaml", "__0_0.distcp"}
    assert sealed.total_bytes == sum(f.stat().st_size for f in path.iterdir() if f.name != MARKER)


def test_without_a_marker_it_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (write(tmp_path, 10) / MARKER).unlink()
    (tmp_path / "iter_0000015.partial-2").mkdir()
    assert [(c.iteration, c.complete) for c in list_checkpoints(tmp_path)] == [(5, True), (10, False)]
    assert remove_partials(tmp_path) == 1
    write(tmp_path, 10)  # takes the place of the unfinished one
    assert len(complete_checkpoints(tmp_path)) == 2
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_every_kind_of_damage_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    sealed = complete_checkpoints(tmp_path)[0][1]
    (path / "__0_0.distcp").write_text("short")
    (path / "common.pt").write_text("common.px" * 10)
    (path / "metadata.json").unlink()
    found = faults(path, sealed)
    assert len(found) == 3
    assert any("__0_0.distcp has 5 bytes instead of 120" in fault for fault in found)
    assert any("common.pt has another sha256" in fault for fault in found)
    assert any("metadata.json is missing" in fault for fault in found)


NEWER = {"format": 2}
UNKNOWN = {"adapters": {"rank": 8}}


def change(path: Path, changes: dict[str, Any]) -> None:
    raw = json.loads((path / MARKER).read_text())
    (path / MARKER).write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: change(path, NEWER), "format 2, and this version reads formats up to 1 (written by megatron-cpt"),
        (lambda path: change(path, UNKNOWN), "keys that this version does not know: adapters"),
        (lambda path: change(path, {"consumed_tokens": "many"}), "consumed_tokens is 'many'"),
        (lambda path: change(path, {"file_bytes": {"a": "b"}}), "file_bytes"),
        (lambda path: (path / MARKER).write_text('{"iteration": 10'), "Expecting"),
        (lambda path: (path / MARKER).write_text("[]"), "not a JSON object"),
        (lambda path: (path / MARKER).write_bytes(b"\xff\xfe"), "utf-8"),
        (lambda path: (path / MARKER).write_text('{"iteration": 10}'), "it lacks attempt, consumed_tokens"),
        (lambda path: ((path / MARKER).unlink(), (path / MARKER).mkdir()), "Is a directory"),
    ],
)
def test_a_marker_that_cannot_be_understood_is_an_error_and_its_checkpoint_stays(
    damage: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        complete_checkpoints(tmp_path)
    assert says in caught.value.message and str(path / MARKER) in caught.value.message
    assert "nothing was deleted" in str(caught.value.hint)
    assert [(c.iteration, c.complete, c.problem is None) for c in list_checkpoints(tmp_path)] == [
        (5, True, True),
        (10, False, False),
    ]
    with pytest.raises(CheckpointError):
        write(tmp_path, 10)  # a save of the same iteration does not overwrite it
    assert (path / "common.pt").is_file()
    remove_partials(tmp_path)
    (path / MARKER).rmdir() if (path / MARKER).is_dir() else (path / MARKER).unlink()
    write(tmp_path, 10)  # without a marker it is an unfinished save, and may be overwritten
    assert len(complete_checkpoints(tmp_path)) == 2


def test_a_marker_of_format_0_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    raw = json.loads((path / MARKER).read_text())
    assert raw.pop("format") == 1
    raw["start"], raw["loop"] = raw.pop("attempt"), {"guard": {"losses": []}}
    del raw["memory"]
    (path / MARKER).write_text(json.dumps(raw))
    ((_, read),) = complete_checkpoints(tmp_path)
    assert (read.attempt, read.memory) == (1, {"guard": {"losses": []}})
    change(path, {"format": 1})  # negative control: the names of format 0 are unknown to format 1
    with pytest.raises(CheckpointError, match="loop, start"):
        complete_checkpoints(tmp_path)


def test_a_marker_survives_the_round_trip() -> None:
    written = replace(marker(), memory={"guard": {"losses": [1.5]}}, file_bytes={"a": 1}, sha256={"a": "b"})
    assert Marker.from_json(json.loads(json.dumps(written.to_json()))) == written


def test_removal_takes_the_marker_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 5)

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_cpt.runs.checkpoints.shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(path)
    assert complete_checkpoints(tmp_path) == []


def test_the_best_is_the_lowest_loss_of_one_set(tmp_path: Path) -> None:
    for iteration, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        write(tmp_path, iteration, validation={"domain": loss, "general": -loss})
    markers = {marker.iteration: marker for _, marker in complete_checkpoints(tmp_path)}
    assert [update_best(tmp_path, {"domain": 1.0}, markers[n]) for n in (1, 2, 3)] == [True, True, False]
    assert read_best(tmp_path) == {"iteration": 2, "name": "domain", "value": 2.0}
    assert update_best(tmp_path, {"general": 1.0}, markers[1])  # another set: another contest
    assert not update_best(tmp_path, {"unknown": 1.0}, markers[1])
