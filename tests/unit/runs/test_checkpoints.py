from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.runs.checkpoints import (
    LATEST,
    MARKER,
    checkpoint_path,
    complete_checkpoints,
    faults,
    leave_shard_hashes,
    list_checkpoints,
    read_best,
    removable,
    remove_checkpoint,
    remove_partials,
    seal,
    set_aside,
    update_best,
)


def write(root: Path, iteration: int, tokens: int = 0, validation: dict[str, float] | None = None) -> Path:
    partial = root / f"iter_{iteration:07d}.partial-1"
    partial.mkdir(parents=True)
    for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp"):
        (partial / name).write_text(name * 10)
    leave_shard_hashes(partial, 0, ["__0_0.distcp", "__0_1.distcp"])
    fields: dict[str, Any] = {
        "iteration": iteration,
        "consumed_tokens": tokens or 100 * iteration,
        "ledger": {},
        "layout": {},
        "optimizer_sharding": "fully_reshardable",
        "start": 1,
        "created": "",
        "versions": {},
        "validation": validation or {},
        "loop": {},
    }
    final = checkpoint_path(root, iteration)
    seal(partial, final, "job_name: t\n", fields)
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
    path, marker = complete_checkpoints(tmp_path)[0]
    assert faults(path, marker) == []
    assert set(marker.sha256) == {".metadata", "common.pt", "metadata.json", "resolved.yaml", "__0_0.distcp"}
    assert marker.total_bytes == sum(f.stat().st_size for f in path.iterdir() if f.name != MARKER)


def test_without_a_marker_it_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (write(tmp_path, 10) / MARKER).write_text('{"iteration": 10')  # cut short
    (tmp_path / "iter_0000015.partial-2").mkdir()
    assert [(c.iteration, c.complete) for c in list_checkpoints(tmp_path)] == [(5, True), (10, False)]
    assert remove_partials(tmp_path) == 1
    write(tmp_path, 10)  # takes the place of the damaged one
    assert len(complete_checkpoints(tmp_path)) == 2
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_every_kind_of_damage_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    marker = complete_checkpoints(tmp_path)[0][1]
    (path / "__0_0.distcp").write_text("short")
    (path / "common.pt").write_text("common.px" * 10)
    (path / "metadata.json").unlink()
    found = faults(path, marker)
    assert len(found) == 3
    assert any("__0_0.distcp has 5 bytes instead of 120" in fault for fault in found)
    assert any("common.pt has another sha256" in fault for fault in found)
    assert any("metadata.json is missing" in fault for fault in found)


def test_retention(tmp_path: Path) -> None:
    for iteration in range(1, 11):
        write(tmp_path, iteration)

    def kept(**rule: Any) -> list[int]:
        markers = complete_checkpoints(tmp_path)
        gone = removable(markers, **({"keep_last": 2, "keep_every_tokens": None, "best_iteration": None} | rule))
        return [marker.iteration for path, marker in reversed(markers) if path not in gone]

    assert kept() == [9, 10]
    assert kept(keep_last=3, best_iteration=4) == [4, 8, 9, 10]
    assert kept(keep_every_tokens=300) == [3, 6, 9, 10]
    assert kept(keep_every_tokens=250) == [3, 5, 8, 9, 10]  # the first at or after each multiple
    assert kept(keep_last=99) == list(range(1, 11))


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
    assert [update_best(tmp_path, "domain", markers[n]) for n in (1, 2, 3)] == [True, True, False]
    assert read_best(tmp_path) == {"iteration": 2, "name": "domain", "value": 2.0}
    assert update_best(tmp_path, "general", markers[1])  # another set: another contest
    assert not update_best(tmp_path, "unknown", markers[1])
