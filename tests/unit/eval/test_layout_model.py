"""A model under tensor- and pipeline-parallel ranks says what transformers says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.eval.generate import generate
from megatron_cpt.eval.hf_model import open_hf_model
from tests.rank_pool import RankPool

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
FIRST = 6


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def asked(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Rows of which the last tokens are the model's own greedy ones, and two answers to the first row."""
    model = open_hf_model(model_dir)
    prompts = torch.randint(0, 258, (3, 16), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = torch.tensor(
        [[*prompt, *new] for prompt, new in zip(prompts, generate(model, prompts, 9, ()), strict=True)]
    )
    labels = torch.cat([tokens[:, FIRST + 1 :], tokens[:1, FIRST + 1 :]])
    labels[3, -1] = (labels[3, -1] + 1) % 258
    told = {
        "inputs": tokens[:, :-1],
        "first": FIRST,
        "labels": labels,
        "rows": torch.tensor([0, 1, 2, 0]),
        "lengths": torch.tensor([24, 7, 15]),
    }
    path = tmp_path_factory.mktemp("asked") / "asked.pt"
    torch.save(told, path)
    return path, told


def _answer(
    pool: RankPool, model_dir: Path, layout: tuple[int, int], asked: Path, folder: Path, fault: str = ""
) -> Any:
    tp, pp = layout
    log, answer = folder / "log", folder / "answer.pt"
    arguments = [str(tp), str(pp), str(asked), str(answer), fault]
    codes = pool.run(model_dir, *arguments, ranks=tp * pp, log=log, main="tests.layout_ranks:main")
    assert codes == [0] * (tp * pp), log.read_text()
    return torch.load(answer)


def test_every_layout_scores_and_continues_as_transformers_in_fp32(
    pool: RankPool, model_dir: Path, asked: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, told = asked
    reference = open_hf_model(model_dir, "float32")
    wanted = reference.likelihoods(told["inputs"], FIRST, told["labels"], told["rows"])
    logits = reference.next_logits(told["inputs"], told["lengths"])
    assert wanted.is_greedy[:3, -9:].all()
    assert not wanted.is_greedy[3, -1]
    assert not wanted.is_greedy[:, :9].all()
    answers = {}
    for layout in LAYOUTS:
        folder = tmp_path / f"{layout}"
        folder.mkdir()
        found, greedy, next_logits = answers[layout] = _answer(pool, model_dir, layout, path, folder)
        assert found.shape == told["labels"].shape
        assert (found - wanted.log_likelihood).abs().max() < 1e-3, layout
        assert torch.equal(greedy, wanted.is_greedy), layout
        assert next_logits.shape == (3, 261)
        assert (next_logits - logits).abs().max() < 1e-3, layout
    for one, other in (((1, 1), (1, 2)), ((2, 1), (2, 2))):  # stages alone change no bit
        assert all(torch.equal(a, b) for a, b in zip(answers[one], answers[other], strict=True))


def test_padding_of_the_vocabulary_that_is_left_in_is_noticed(
    pool: RankPool, model_dir: Path, asked: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, told = asked
    wanted = open_hf_model(model_dir).likelihoods(told["inputs"], FIRST, told["labels"], told["rows"])
    found, _, logits = _answer(pool, model_dir, (2, 1), path, tmp_path, fault="padding")
    assert (found - wanted.log_likelihood).abs().max() > 1e-3
    assert logits.shape[1] > 261
