"""`megatron-cpt runs`: the list, the comparison, the difference."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from click.testing import CliRunner

from megatron_cpt.cli import cli
from tests.tiny_runs import step, write_run


def runs(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["runs", *map(str, words)])
    return done.exit_code, done.output + str(done.exception or "")


def two_runs(root: Path) -> tuple[Path, Path]:
    first = write_run(
        root / "first",
        [
            step(0, event="validation", name="domain", loss=3.0),
            *(step(i) for i in range(1, 9)),
            step(8, event="validation", name="domain", loss=2.0),
            step(8, event="finished"),
        ],
    )
    return first, write_run(root / "deep" / "second")


def test_the_list_has_every_run_and_hides_none_behind_a_broken_one(tmp_path: Path) -> None:
    two_runs(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "resolved.yaml").write_text("job_name: [")
    code, said = runs(tmp_path, "--json")
    assert code == 0, said
    listed = {Path(row["run_dir"]).name: row for row in json.loads(said)}
    assert set(listed) == {"first", "second", "broken"}
    first = listed["first"]
    assert (first["name"], first["state"], first["consumed_tokens"], first["train_tokens"]) == (
        "tiny",
        "finished",
        4096,
        4096,
    )
    assert first["validation"] == {"domain": 2.0} and first["loss"] == 4.92
    assert listed["broken"]["state"] == "unreadable" and listed["second"]["state"] == "not_started"
    code, said = runs(tmp_path)
    assert code == 0 and len(said.splitlines()) == 3 and "domain 2.0000" in said


def test_compared_runs_show_before_and_after(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    code, said = runs("compare", first, second, "--picture", tmp_path / "both.png")
    assert code == 0, said
    assert "3.0000 -> 2.0000" in said and "20.09 -> 7.39 (-63.2%)" in said
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"
    code, said = runs("compare", first, "--picture", tmp_path / "both.jpg")
    assert code != 0 and "ends in .png or .svg" in said
    code, said = runs("compare", tmp_path / "deep")
    assert code != 0 and "is not a run folder" in said


def test_the_difference_is_every_key_that_differs(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    assert runs("diff", first, first) == (0, "the configs are the same\n")
    tree = yaml.safe_load((second / "resolved.yaml").read_text())
    tree["optimizer"] = {"lr": 1e-6}
    (second / "resolved.yaml").write_text(yaml.safe_dump(tree))
    code, said = runs("diff", first, second, "--json")
    assert code == 0
    differing = {row["path"]: (row["first"], row["second"]) for row in json.loads(said)}
    assert differing["optimizer.lr"] == (5e-5, 1e-6)
    assert {"optimizer.lr", "run_dir"} <= set(differing)


def test_a_folder_that_is_not_there_is_an_error_with_a_hint(tmp_path: Path) -> None:
    code, said = runs(tmp_path / "none")
    assert code != 0 and "there is no folder" in said
    assert runs(tmp_path) == (0, f"no run below {tmp_path}\n")
