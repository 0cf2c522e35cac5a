"""kill -9 at any moment, then the same command: the losses of the undisturbed run, bit by bit.

`--kill-points N` kills N times in all (default 6), spread over three layouts.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from megatron_cpt.runs.checkpoints import complete_checkpoints, faults
from megatron_cpt.runs.metrics import read_metrics
from tests.configs import tiny_run
from tests.integration.conftest import linked
from tests.rank_pool import RankPool

LAYOUTS = {"PP2": {"pp": 2}, "TP2": {"tp": 2}, "DP2": {}}
STEPS = 16
Row = tuple[float, float, float]


@pytest.fixture(scope="module")
def work(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs' folder for runs, configs and logs of these tests."""
    return linked(inputs, tmp_path_factory.mktemp("resume"))


def write_config(work: Path, run: str, layout: dict[str, int], **changes: object) -> Path:
    train = [
        {"name": "domain", "prefix": str(work / "domain"), "weight": 3},
        {"name": "general", "prefix": str(work / "general"), "weight": 1},
    ]
    validation = {"held_out": str(work / "held_out")}
    config = tiny_run(
        work,
        run_dir=str(work / run),
        seed=7,
        budget={"train_tokens": 512 * STEPS, "warmup_tokens": 1024},
        batch={"micro_batch_size": 2},
        optimizer={"lr": 2e-3, "min_lr": 1e-4},
        parallel={"gpus_per_node": 2, **layout},
        data={"train": train, "validation": validation, "cache_dir": str(work / "index_cache")},
        eval={"every": "6 iters"},
        checkpoint={"save_every": "3 iters"},
    )
    config |= changes
    path = work / f"{run}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def rows(run: Path) -> dict[object, Row]:
    """iteration -> (loss, gradient norm, lr), and (iteration, set) -> validation loss."""
    found: dict[object, Row] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        if row.get("event") == "validation":
            found[row["iteration"], row["name"]] = (row["loss"], row["tokens"], 0)
        elif "event" not in row:
            found[row["iteration"]] = (row["loss"], row["grad_norm"], row["lr"])
    return found


@pytest.fixture(scope="module")
def undisturbed(pool: RankPool, work: Path) -> dict[str, dict[object, Row]]:
    results = {}
    for name, layout in LAYOUTS.items():
        config = write_config(work, f"whole_{name}", layout)
        assert pool.run(config, ranks=2, log=work / f"whole_{name}.log") == [0, 0]
        results[name] = rows(work / f"whole_{name}")
        assert {k for k in results[name] if isinstance(k, int)} == set(range(1, STEPS + 1))
        assert {k[0] for k in results[name] if isinstance(k, tuple)} == {0, 6, 12, STEPS}
    return results


@pytest.mark.parametrize("name", LAYOUTS)
def test_killed_at_random_moments_the_losses_stay_the_same(
    name: str, pool: RankPool, work: Path, undisturbed: dict[str, dict[object, Row]], request: pytest.FixtureRequest
) -> None:
    points = -(-int(request.config.getoption("--kill-points")) // len(LAYOUTS))
    seed = int(request.config.getoption("--kill-seed")) or random.SystemRandom().randrange(1, 10**6)
    print(f"--kill-seed {seed}")
    rng = random.Random(f"{seed} {name}")
    run, log = work / f"killed_{name}", work / f"killed_{name}.log"
    config = write_config(work, run.name, LAYOUTS[name])
    moments = []
    while len(moments) < points:
        pids = pool.start(config, ranks=2, log=log)
        moment = wait_for_a_moment(rng, run, len(moments), pool)
        with contextlib.suppress(ProcessLookupError):  # it has finished
            os.kill(rng.choice(pids), signal.SIGKILL)
        codes = pool.wait()
        if codes == [0, 0]:  # it finished first: from the beginning again
            shutil.rmtree(run)
            continue
        assert -signal.SIGKILL in codes, log.read_text()[-3000:]
        moments.append(moment)
        for path, marker in complete_checkpoints(run / "checkpoints"):
            assert faults(path, marker) == []
    assert pool.run(config, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    assert rows(run) == undisturbed[name], f"--kill-seed {seed}: killed {moments}"


def wait_for_a_moment(rng: random.Random, run: Path, number: int, pool: RankPool) -> str:
    """Every other kill falls into a save, the others anywhere from the first import to the last step."""
    deadline = time.monotonic() + 60
    if number % 2:
        before = {path.name for path in run.glob("checkpoints/iter_*")}
        while time.monotonic() < deadline and not pool.have_ended():
            partial = [p.name for p in run.glob("checkpoints/*.partial-[1-9]*") if p.name not in before]
            if partial:
                time.sleep(rng.uniform(0, 0.3))
                return f"in the save of {partial[0]}"
            time.sleep(0.002)
    starts = len(list(run.glob("metrics.jsonl")))
    moment = rng.uniform(0.3, 4.0)
    time.sleep(moment)
    return f"{moment:.2f} s after start ({starts})"


def wait_for_step(step: int, run: Path, pool: RankPool, log: Path) -> None:
    """Return when `step` is trained; ranks that have ended, or take five minutes for it, are a failure at once."""
    deadline = time.monotonic() + 300
    while step not in rows(run):
        if pool.have_ended():
            pytest.fail(f"the ranks ended with {pool.wait()} before step {step}: {log.read_text()[-3000:]}")
        assert time.monotonic() < deadline, f"no step {step} after five minutes: {log.read_text()[-3000:]}"
        time.sleep(0.01)


def test_another_layout_continues_within_rounding(
    pool: RankPool, work: Path, undisturbed: dict[str, dict[object, Row]]
) -> None:
    """PP2 with 3 and 1 layers, then TP2, then DP2: the same samples and, to 1e-6, the same losses."""
    run, log = work / "moved", work / "moved.log"
    for steps, layout in (
        (6, LAYOUTS["PP2"] | {"last_stage_layers": 1}),
        (11, LAYOUTS["TP2"]),
        (STEPS, LAYOUTS["DP2"]),
    ):
        # the schedule is that of the whole budget: the run is stopped at `steps` by its switch file
        config = write_config(work, run.name, layout)
        pids = pool.start(config, ranks=2, log=log)
        if steps < STEPS:
            wait_for_step(steps, run, pool, log)
            os.kill(pids[1], signal.SIGUSR1)  # a rank that is not 0: all agree to stop
        assert pool.wait() == ([75, 75] if steps < STEPS else [0, 0]), log.read_text()[-3000:]
    moved, whole = rows(run), undisturbed["PP2"]
    assert moved.keys() == whole.keys()
    assert max(abs(moved[k][0] - whole[k][0]) for k in whole) <= 1e-6
    starts = [row for row in read_metrics(run / "metrics.jsonl") if row.get("event") == "stopped"]
    assert len(starts) == 2
    # negative control: another seed is another run
    other = write_config(work, "other_seed", LAYOUTS["PP2"], seed=8)
    assert pool.run(other, ranks=2, log=log) == [0, 0]
    assert max(abs(rows(work / "other_seed")[k][0] - whole[k][0]) for k in whole if isinstance(k, int)) > 1e-4


def test_bf16_and_both_forms_of_the_optimizer_resume_exactly(pool: RankPool, work: Path) -> None:
    """DP2 in bf16: stopped twice, the optimizer saved as dp_reshardable and then as fully_reshardable."""
    precision = {"precision": {"dtype": "bf16"}}
    whole = write_config(work, "bf16", LAYOUTS["DP2"], **precision)
    assert pool.run(whole, ranks=2, log=work / "bf16.log") == [0, 0]
    run, log = work / "bf16_stopped", work / "bf16_stopped.log"
    for steps, sharding in ((5, "dp_reshardable"), (10, "fully_reshardable"), (STEPS, "dp_reshardable")):
        checkpoint = {"save_every": "3 iters", "optimizer_sharding": sharding}
        config = write_config(work, run.name, LAYOUTS["DP2"], checkpoint=checkpoint, **precision)
        pids = pool.start(config, ranks=2, log=log)
        if steps < STEPS:
            wait_for_step(steps, run, pool, log)
            os.kill(pids[0], signal.SIGTERM)
        assert pool.wait() == ([75, 75] if steps < STEPS else [0, 0]), log.read_text()[-3000:]
        newest = complete_checkpoints(run / "checkpoints")[0][1]
        assert newest.optimizer_sharding == sharding
    assert rows(run) == rows(work / "bf16")
    other = write_config(work, run.name, LAYOUTS["TP2"], **precision)
    assert pool.run(other, ranks=2, log=log) == [2, 2]
    assert "fixes how the model is split: tp 1 -> 2" in log.read_text()


def test_a_run_continues_with_another_learning_rate(pool: RankPool, work: Path) -> None:
    """Megatron-Core 0.19 knows a group of parameters by its learning rates."""
    run, log = work / "other_rate", work / "other_rate.log"
    for steps, rate in ((3, 2e-3), (6, 4e-3)):
        budget, optimizer = {"train_tokens": 512 * steps, "warmup_tokens": 0}, {"lr": rate, "min_lr": rate / 2}
        config = write_config(work, run.name, LAYOUTS["DP2"], budget=budget, optimizer=optimizer)
        assert pool.run(config, ranks=2, log=log) == [0, 0], log.read_text()[-3000:]
    rates = {step: row[2] for step, row in rows(run).items() if isinstance(step, int)}
    assert rates[6] == pytest.approx(2e-3, rel=0.1) and rates[4] > rates[6] > rates[3]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, whole; what no rank wrote is NaN."""
    found = {
        name: torch.full(stored.size, float("nan"), dtype=stored.properties.dtype)
        for name, stored in dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
        if hasattr(stored, "size")
    }
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


@pytest.mark.parametrize(("name", "moved"), [("DP2", "TP2"), ("TP2", "DP2"), ("PP2", "DP2")])
def test_shards_written_and_loaded_in_place_are_the_tensors_that_megatron_core_gathers(
    name: str, moved: str, pool: RankPool, work: Path
) -> None:
    def train(run: str, layout: str, steps: int, hook: str) -> dict[str, torch.Tensor]:
        changes = {"precision": {"dtype": "bf16"}, "budget": {"train_tokens": steps * 512, "warmup_tokens": 0}}
        checkpoint = {"checkpoint": {"save_every": "2 iters", "keep_last": 3}}
        config = write_config(work, run, LAYOUTS[layout], **changes, **checkpoint)
        assert pool.run(config, ranks=2, log=work / f"{run}.log", env={"TEST_FAULT": hook}) == [0, 0]
        return tensors(work / run / "checkpoints" / f"iter_{steps:07}")

    runs = ((f"ours_{name}", ""), (f"engine_{name}", "tests.faults:engine_handles_optimizer"))
    ours, engine = (train(run, name, 4, hook) for run, hook in runs)
    assert ours.keys() == engine.keys() and sum(key.startswith("optimizer.") for key in ours) > 20
    assert all(torch.equal(ours[key], engine[key]) for key in ours)
    # negative control: two steps earlier it is another state
    earlier = tensors(work / f"ours_{name}" / "checkpoints" / "iter_0000002")
    assert not any(torch.equal(ours[key], earlier[key]) for key in ours if ".exp_avg." in key)
    ours, engine = (train(run, moved, 6, hook) for run, hook in runs)
    assert all(torch.equal(ours[key], engine[key]) for key in ours)
