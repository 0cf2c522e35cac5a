"""Position, epochs and ledger over real Megatron-Core indices on tiny datasets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.budget import BatchSize
from megatron_cpt.config.load import build_config
from megatron_cpt.config.phases import phase_at
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.corpus.dataset.manifest import bin_path, manifest_hash, read_manifest
from megatron_cpt.data.datasets import Dataset, Datasets, plan_sources
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.errors import DataError
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
from tests.synthetic_data import EOD, random_documents, write_dataset

adapt_megatron_core_to_cpu()

from megatron_cpt.data.batches import BatchStream, StepPlan, open_batches  # noqa: E402
from megatron_cpt.data.epochs import EpochStream  # noqa: E402
from megatron_cpt.data.micro_batch import document_ids  # noqa: E402
from megatron_cpt.data.validation import ValidationSet  # noqa: E402

SEQ = 32


def make_config(folder: Path, seq_length: int = SEQ, train_tokens: int = SEQ * 200, **weights: float) -> RunConfig:
    train = [{"name": n, "prefix": str(folder / n), "weight": w} for n, w in (weights or {"a": 3, "b": 1}).items()]
    return build_config(
        {
            "job_name": "t",
            "seed": 5,
            "model": {"init_from": "m"},
            "batch": {"seq_length": seq_length, "global_batch_size": 8},
            "budget": {"train_tokens": train_tokens, "warmup_tokens": 0},
            "data": {"train": train, "max_epochs": 50},
        }
    )


def datasets_of(config: RunConfig) -> Datasets:
    def one(name: str, prefix: str) -> Dataset:
        m = read_manifest(prefix)
        return Dataset(name, prefix, manifest_hash(m), m.token_count, EOD, m.tokenizer.vocab_size)

    return Datasets(tuple(one(s.name, s.prefix) for s in config.data.train), ())


class Opened:
    """The data of a run, whose steps have as many samples as a test says."""

    def __init__(self, config: RunConfig, stream: BatchStream) -> None:
        self.config, self.streams, self.micro_batches = config, stream.streams, stream.micro_batches
        self.documents, self._plan = stream.documents, stream.plan_step

    def plan_step(self, ledger: Ledger, samples: int) -> StepPlan:
        return self._plan(ledger, replace(phase_at(self.config, ledger.tokens), batch_size=BatchSize(samples)))


def open_run(config: RunConfig, folder: Path, ledger: Ledger | None = None) -> tuple[Opened, Ledger]:
    datasets = datasets_of(config)
    ledger = (ledger or Ledger()).with_sources(datasets.manifests(), config.batch.seq_length)
    plans = plan_sources(config, datasets, ledger)
    return Opened(config, open_batches(config, datasets, ledger, plans, folder / "cache")), ledger


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("a", 60), ("b", 25), ("c", 25)):
        write_dataset(folder / name, random_documents(count, 128, seed=ord(name)))
    return folder


def consume(stream: Opened, ledger: Ledger, batches: list[int]) -> tuple[list[object], Ledger]:
    seen: list[object] = []
    for size in batches:
        plan = stream.plan_step(ledger, size)
        seen += plan.samples
        ledger = plan.ledger
    return seen, ledger


@given(st.lists(st.sampled_from([4, 8, 16, 24]), min_size=2, max_size=8), st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_resume_point_and_batch_size_reads_the_same_samples(
    data: Path, batches: list[int], draw: st.DataObject
) -> None:
    config = make_config(data)
    stream, ledger = open_run(config, data)
    whole, end = consume(stream, ledger, [sum(batches)])
    cut = draw.draw(st.integers(0, len(batches)))
    first, middle = consume(stream, ledger, batches[:cut])
    # what a restart does: the ledger goes through JSON, the stream is opened anew
    again, resumed = open_run(config, data, Ledger.from_json(middle.to_json()))
    second, last = consume(again, resumed, batches[cut:])
    assert first + second == whole
    assert last == end
    assert abs(end.sources["a"].tokens / SEQ - 0.75 * sum(batches)) < 1


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 2)])
def test_a_step_has_the_same_tokens_under_every_layout(data: Path, micro: int, dp: int) -> None:
    stream, ledger = open_run(make_config(data), data)
    plan = stream.plan_step(ledger, 8)
    reference = torch.cat([m["tokens"] for m in stream.micro_batches(plan, 8, 0, 1)])
    rows = {}
    for rank in range(dp):
        for i, batch in enumerate(stream.micro_batches(plan, micro, rank, dp)):
            for j, row in enumerate(batch["tokens"]):
                rows[(i * dp + rank) * micro + j] = row
    assert len(rows) == 8
    assert all(torch.equal(rows[n], reference[n]) for n in range(8))


def test_an_epoch_reads_every_block_once_and_the_next_in_another_order(data: Path) -> None:
    config = make_config(data, a=1.0)
    stream, _ = open_run(config, data)
    source = stream.streams["a"]
    blocks = source.blocks_per_epoch
    epochs = [[tuple(source.read((e * blocks + i) * SEQ, SEQ)[0].tolist()) for i in range(blocks)] for e in (0, 1)]
    whole = np.fromfile(bin_path(data / "a"), np.uint16)
    for epoch in epochs:
        # all documents are read, but for the tail shorter than a block
        counted = np.bincount(np.concatenate([np.array(b) for b in epoch]), minlength=128)
        assert 0 <= (np.bincount(whole, minlength=128) - counted).sum() <= 2 * SEQ
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # the documents are shuffled anew, so the blocks differ


def test_an_epoch_is_the_same_from_files_and_in_memory_on_every_rank(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: Path, first_epoch: int) -> list[torch.Tensor]:
        source = open_run(make_config(data, a=1.0), folder)[0].streams["a"]
        blocks = range(first_epoch * source.blocks_per_epoch, (first_epoch + 1) * source.blocks_per_epoch)
        return [torch.stack(source.read(block * SEQ, SEQ)) for block in blocks]

    from_files = [read(tmp_path / "files", epoch) for epoch in (0, 1)]
    monkeypatch.setattr("megatron_cpt.data.epochs.EPOCHS_ON_DISK", 0)
    for rank in (0, 1):  # Megatron-Core builds files on rank 0 alone
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *args, rank=rank: rank)
        in_memory = [read(tmp_path / "memory", epoch) for epoch in (0, 1)]
        assert all(map(torch.equal, from_files[0] + from_files[1], in_memory[0] + in_memory[1]))
        assert not all(map(torch.equal, from_files[1], in_memory[0]))  # the comparison can fail
    assert not list((tmp_path / "memory").rglob("*.npy"))


def test_a_budget_of_a_million_epochs_opens_at_once_and_resumes_in_its_middle(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_epoch = datasets_of(make_config(data, a=1.0)).train[0].tokens
    config = make_config(data, train_tokens=SEQ * 8 * (one_epoch * 10**6 // (SEQ * 8)), a=1.0)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_epochs": 2e6})})
    stream, ledger = open_run(config, tmp_path)
    assert 1 < len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) <= 64
    far = ledger.advanced({"a": 8 * (one_epoch * 10**6 // (SEQ * 16))}, SEQ)
    again, _ = open_run(config, tmp_path, Ledger.from_json(far.to_json()))
    there, resumed, at_the_start = (
        next(opened.micro_batches(opened.plan_step(position, 8), 8, 0, 1))["tokens"]
        for opened, position in ((stream, far), (again, far), (stream, ledger))
    )
    assert torch.equal(there, resumed)
    assert not torch.equal(there, at_the_start)
    assert not [record for record in caplog.records if record.name.startswith("megatron.core.datasets.gpt")]


def test_an_index_whose_files_were_removed_during_the_run_is_built_again_in_memory(data: Path, tmp_path: Path) -> None:
    stream, ledger = open_run(make_config(data), tmp_path)
    plan = stream.plan_step(ledger, 8)
    before = next(stream.micro_batches(plan, 8, 0, 1))["tokens"]
    again, _ = open_run(make_config(data), tmp_path)
    for path in (tmp_path / "cache").rglob("*sample_index.npy"):
        path.unlink()
    assert torch.equal(next(again.micro_batches(plan, 8, 0, 1))["tokens"], before)


def test_labels_are_the_next_tokens_and_documents_are_named(data: Path) -> None:
    stream, ledger = open_run(make_config(data), data)
    plan = stream.plan_step(ledger, 2)
    batch = next(iter(stream.micro_batches(plan, 2, 0, 1)))
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    entry = stream.documents(plan)[0]
    names = [s.name for s in make_config(data).data.train]
    assert names[int(batch["source"][0])] == entry["source"] == plan.samples[0].source
    reader = {tuple(d.tolist()) for d in random_documents(60, 128, ord("a")) + random_documents(25, 128, ord("b"))}
    inside = batch["tokens"][0].tolist()
    ends = [i for i, t in enumerate(inside) if t == EOD]
    if len(ends) >= 2:
        assert tuple(inside[ends[0] + 1 : ends[1] + 1]) in reader
    assert len(entry["documents"]) >= len(ends)


def test_a_new_sequence_length_goes_on_at_the_same_token(data: Path) -> None:
    """Changing seq_length in mid-run: the tokens read are those that the old length would have read."""
    config = make_config(data, a=1.0)
    stream, ledger = open_run(config, data)
    _, ledger = consume(stream, ledger, [8, 3])
    old = [stream.streams["a"].read(ledger.sources["a"].tokens + i * SEQ, SEQ) for i in range(6)]
    for length in (16, 48, 64, 96):
        again, resumed = open_run(make_config(data, seq_length=length, a=1.0), data, ledger)
        position = resumed.sources["a"].tokens
        assert resumed.sources["a"].block_tokens == SEQ
        read = [again.streams["a"].read(position + i * length, length) for i in range(6 * SEQ // length)]
        for part in (0, 1):
            expected = torch.cat([pair[part] for pair in old])
            assert torch.equal(torch.cat([pair[part] for pair in read]), expected[: len(read) * length])


def test_a_changed_blend_continues_each_source(data: Path) -> None:
    stream, ledger = open_run(make_config(data), data)
    before, middle = consume(stream, ledger, [40])
    changed = make_config(data, a=1.0, b=1.0, c=1.0)
    again, resumed = open_run(changed, data, middle)
    after, _ = consume(again, resumed, [60])
    for name in "abc":
        positions = [s.offset_tokens for s in before + after if s.source == name]
        assert positions == [i * SEQ for i in range(len(positions))]
    without_b = make_config(data, a=1.0, c=1.0)
    _, kept = open_run(without_b, data, resumed)
    assert kept.sources["b"] == resumed.sources["b"]


def test_a_dataset_that_changed_under_its_name_is_refused(data: Path, tmp_path: Path) -> None:
    _, ledger = open_run(make_config(data), data)
    with pytest.raises(DataError, match="another dataset") as caught:
        ledger.with_sources({"a": "feedfeedfeedfeed"}, SEQ)
    assert "new source name" in str(caught.value)


def test_a_longer_budget_keeps_the_order_and_indices_are_reused(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    short, ledger = open_run(make_config(data), data)
    longer, _ = open_run(make_config(data, train_tokens=SEQ * 800), data)
    plan = short.plan_step(ledger, 64)
    assert longer.plan_step(ledger, 64) == plan
    first = next(short.micro_batches(plan, 64, 0, 1))["tokens"]
    assert torch.equal(first, next(iter(longer.micro_batches(plan, 64, 0, 1)))["tokens"])
    caplog.clear()
    with caplog.at_level("INFO", "megatron_cpt.data.epochs"):
        open_run(make_config(data, train_tokens=SEQ * 800), data)
    assert "built" not in caplog.text


def test_a_half_built_index_is_built_again(data: Path, tmp_path: Path) -> None:
    config = make_config(data, a=1.0)
    stream, _ = open_run(config, tmp_path)
    folder = stream.streams["a"]._folder(0)
    partial = folder.with_name(folder.name + ".partial")
    folder.rename(partial)
    next(partial.glob("*shuffle_index.npy")).write_bytes(b"cut")
    again, _ = open_run(config, tmp_path)
    assert torch.equal(again.streams["a"].read(0, SEQ)[0], open_run(config, data)[0].streams["a"].read(0, SEQ)[0])


def test_the_plan_covers_the_last_step_after_a_change_of_the_batch_size(data: Path) -> None:
    """Consumed 3 x 8 samples of 40; in steps of 32 the run ends at 56, and the indices must reach that far."""
    config = make_config(data, train_tokens=SEQ * 40, a=1.0)
    stream, ledger = open_run(config, data)
    _, ledger = consume(stream, ledger, [8, 8, 8])
    changed = config.model_copy(update={"batch": config.batch.model_copy(update={"global_batch_size": 32})})
    (plan,) = plan_sources(changed, datasets_of(changed), ledger)
    assert plan.needed_tokens == SEQ * 32


def test_too_many_epochs_are_refused(data: Path) -> None:
    config = make_config(data, train_tokens=SEQ * 3000)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_epochs": 2.0})})
    with pytest.raises(DataError, match="max_epochs allows 2") as caught:
        open_run(config, data)
    assert "data.max_epochs=" in str(caught.value.hint)


@pytest.mark.parametrize(("micro", "dp", "limit"), [(1, 1, None), (2, 2, None), (4, 3, 700)])
def test_validation_predicts_every_token_once(data: Path, micro: int, dp: int, limit: int | None) -> None:
    config = make_config(data)
    held_out = ValidationSet(datasets_of(config).train[1], SEQ, limit)
    stream = np.fromfile(bin_path(data / "b"), np.uint16)
    batches = [list(held_out.micro_batches(micro, rank, dp)) for rank in range(dp)]
    assert len({len(b) for b in batches}) == 1
    pairs = []
    for round_ in range(len(batches[0])):
        for rank in range(dp):
            m = batches[rank][round_]
            keep = m["loss_mask"] > 0
            pairs += list(zip(m["tokens"][keep].tolist(), m["labels"][keep].tolist(), strict=True))
    count = held_out.predicted_tokens
    assert pairs == list(zip(stream[:count].tolist(), stream[1 : count + 1].tolist(), strict=True))
    assert count == (limit or len(stream) - 1)


def test_each_source_ends_its_documents_with_its_own_eod(data: Path, tmp_path: Path) -> None:
    """Source a ends documents with 0; here b does with 3, a token like any other in a."""
    config = make_config(data, a=1.0, b=1.0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"document_attention": True})})
    datasets = datasets_of(config)
    other = replace(datasets.train[1], eod_id=3)
    ledger = Ledger().with_sources(datasets.manifests(), SEQ)
    datasets = Datasets((datasets.train[0], other), ())
    stream = Opened(
        config, open_batches(config, datasets, ledger, plan_sources(config, datasets, ledger), tmp_path / "cache")
    )
    seen = set()
    for batch in stream.micro_batches(stream.plan_step(ledger, 40), 4, 0, 1):
        for row, source in enumerate(batch["source"].tolist()):
            tokens, eod = batch["tokens"][row].tolist(), (0, 3)[source]
            ends = [int(token == eod) for token in tokens]
            assert batch["document_ids"][row].tolist() == [sum(ends[:i]) for i in range(len(ends))]
            seen.add((source, sum(ends) > 0, any(token == (3, 0)[source] for token in tokens)))
    assert {(0, True, True), (1, True, True)} <= seen  # both EODs stood in both sources


def test_document_ids_change_after_each_end_of_document() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 1, 1, 1, 1, 0]])
    assert document_ids(tokens, torch.tensor([[0], [0]])).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


def test_an_id_beyond_the_vocabulary_that_no_sample_met_ends_the_training(tmp_path: Path) -> None:
    """The checks before a job look at a sample of ids, the stream at all those that it gives."""
    prefix = write_dataset(tmp_path / "set", random_documents(12, 100, seed=1), 100)
    tokens = np.fromfile(bin_path(prefix), np.uint16)

    def read() -> None:
        stream = EpochStream(Dataset("set", str(prefix), "0", len(tokens), EOD, 100), 16, 1, tmp_path / "cache")
        for position in range(0, stream.blocks_per_epoch * 16, 16):
            stream.read(position, 16)

    read()
    tokens[len(tokens) // 2] = 100
    tokens.tofile(bin_path(prefix))
    with pytest.raises(DataError, match="dataset 'set': the id 100 is outside the vocabulary of 100") as caught:
        read()
    assert caught.value.hint == f"megatron-cpt verify {prefix}"
