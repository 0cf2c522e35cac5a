"""Which nodes are bad, from what was found on each."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.slurm.preflight import exclude, excluded_nodes, judge


def report(folder: Path, node: str, *errors: tuple[str, str]) -> None:
    checks = [{"name": "disk", "verdict": "ok", "detail": "", "hint": None}]
    checks += [{"name": name, "verdict": "error", "detail": detail, "hint": "do"} for name, detail in errors]
    (folder / f"{node}.json").write_text(json.dumps({"failed": bool(errors), "checks": checks}))


def test_a_node_with_an_error_or_without_a_report_is_bad_where_others_are_sound(tmp_path: Path) -> None:
    report(tmp_path, "n1")
    report(tmp_path, "n2", ("GPU memory errors", "3 uncorrected on GPU 5"))
    (tmp_path / "n4.json").write_text("{")
    verdict = judge(tmp_path, ["n1", "n2", "n3", "n4"])
    assert list(verdict.bad) == ["n2", "n3", "n4"] and verdict.common is None
    assert verdict.bad["n2"] == "GPU memory errors: 3 uncorrected on GPU 5 (do)"
    assert "left no report" in verdict.bad["n3"]


def test_an_error_of_all_nodes_speaks_against_none_of_them(tmp_path: Path) -> None:
    for node in ("n1", "n2"):
        report(tmp_path, node, ("data", "data/x.idx does not exist"))
    verdict = judge(tmp_path, ["n1", "n2"])
    assert verdict.bad == {} and verdict.common == "data: data/x.idx does not exist (do)"


def test_faulty_hardware_speaks_against_its_node_even_alone(tmp_path: Path) -> None:
    report(tmp_path, "n1", ("computation", "wrong result on GPU 3"))
    assert list(judge(tmp_path, ["n1"]).bad) == ["n1"]


def test_sound_nodes_are_not_bad(tmp_path: Path) -> None:
    for node in ("n1", "n2"):
        report(tmp_path, node)
    verdict = judge(tmp_path, ["n1", "n2"])
    assert verdict.bad == {} and verdict.common is None


def test_the_list_of_excluded_nodes_grows_and_keeps_its_reasons(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert excluded_nodes(folder) == {}
    exclude(folder, {"n2": "GPU memory errors:\n3 uncorrected"})
    exclude(folder, {"n2": "again", "n7": "dead # and gone"})
    assert excluded_nodes(folder) == {"n2": "GPU memory errors: 3 uncorrected", "n7": "dead # and gone"}
