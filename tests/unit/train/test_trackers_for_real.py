"""Each tracker with its own package and no network: what two attempts of a run wrote is read back from its files."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Points = list[tuple[int, float]]  # consumed tokens, loss

ATTEMPT = """
import json, os, socket, sys
from pathlib import Path
log, first = json.loads(sys.argv[2]), int(sys.argv[3])

def no_network(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        raise OSError(f"a connection to {address}")
    return connect(self, address)

connect = socket.socket.connect
socket.socket.connect = no_network
from megatron_cpt.config.load import build_config
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.train.metrics import MetricsFile
from megatron_cpt.train.trackers import open_trackers
folder = RunFolder(Path(sys.argv[1]))
config = build_config({"job_name": "tiny", "model": {"init_from": "m"}, "log": log})
trackers = open_trackers(config, folder)
assert len(trackers) == 1, "it could not be opened"
metrics = MetricsFile(folder.metrics, 1, trackers)
for iteration in (first, first + 1):
    tokens = 2**31 * iteration
    metrics.write(iteration=iteration, consumed_tokens=tokens, loss=4.0 / iteration, loss_by_source={"a b": 1.5})
metrics.write(event="validation", name="held out", iteration=first, consumed_tokens=tokens, loss=2.0, perplexity=7.4)
assert metrics.trackers, "it was dropped"
metrics.close()
os._exit(0)  # as a rank ends
"""


def _tensorboard(root: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(root / "tensorboard"))
    found.Reload()
    assert {"loss_by_source/a b", "validation/held out/perplexity"} <= set(found.Tags()["scalars"])
    return [(event.step, event.value) for event in found.Scalars("loss")]


def _wandb(root: Path) -> Points:
    from wandb.proto import wandb_internal_pb2

    points: Points = []
    for file in sorted((root / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in _leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "loss" in values:
                points.append((int(float(values["consumed_tokens"])), float(values["loss"])))
    return points


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB: blocks of 32 KiB of pieces, each behind checksum, length and kind."""
    place, record = 7, b""  # behind the head of the file
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a head: the block is filled up
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def _mlflow(root: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("cpt").experiment_id])
    assert run.data.params["job_name"] == "tiny" and run.info.status == "FINISHED"
    assert {"loss_by_source/a b", "validation/held out/perplexity"} <= set(run.data.metrics)
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]


def _trackio(root: Path) -> Points:
    with sqlite3.connect(root / "trackio" / "cpt.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"tiny"}
    return [(step, row["loss"]) for _, step, text in rows if "loss" in (row := json.loads(text))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages that read
@pytest.mark.parametrize(
    ("package", "log", "read"),
    [
        ("tensorboard", {"tensorboard": True}, _tensorboard),
        ("wandb", {"wandb_project": "cpt"}, _wandb),
        ("mlflow", {"mlflow_experiment": "cpt"}, _mlflow),
        ("trackio", {"trackio_project": "cpt"}, _trackio),
    ],
)
def test_two_attempts_of_a_run_are_one_curve_in_the_files_of_the_tracker(
    package: str, log: dict[str, Any], read: Callable[[Path], Points], tmp_path: Path
) -> None:
    pytest.importorskip(package)
    root = tmp_path / "it's a run"
    root.mkdir()
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))}
    for first in (1, 3):
        words = [sys.executable, "-c", ATTEMPT, str(root), json.dumps(log), str(first)]
        done = subprocess.run(words, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    tokens, losses = zip(*read(root), strict=True)
    assert tokens == tuple(2**31 * iteration for iteration in (1, 2, 3, 4))
    assert losses == pytest.approx([4, 2, 4 / 3, 1])
    assert {path.name for path in tmp_path.iterdir()} == {root.name}  # nothing beside the run


def test_a_server_that_does_not_answer_is_left_out_soon(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    log = {"mlflow_experiment": "cpt", "mlflow_uri": "http://127.0.0.1:9"}
    words = [sys.executable, "-c", ATTEMPT, str(tmp_path), json.dumps(log), "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert "no rows for MLflow" in done.stderr and "it could not be opened" in done.stderr
