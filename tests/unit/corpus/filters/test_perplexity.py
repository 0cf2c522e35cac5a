"""The perplexity ceiling: transformers' own loss decides, what is over it is counted, mistakes are named at start."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.dataset.manifest import bin_path
from megatron_cpt.corpus.filters.perplexity import load_scorer
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema_processing import Perplexity
from megatron_cpt.errors import ConfigError, DataError
from tests.unit.corpus.conftest import TEXTS, build_tokenizer, write_jsonl
from tests.unit.corpus.dedup.test_dedup import decoded, document

MAX_TOKENS = 48
DOCUMENTS = [*TEXTS[:4], *(document(i) for i in range(16))]


def write_model(folder: Path, seed: int) -> Path:
    """A random model that is sure of itself, so that documents differ in perplexity."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(build_tokenizer(folder))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("perplexity") / "model", seed=0)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[float]:
    """Perplexities by transformers' own loss."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    inputs = [torch.tensor([tokenizer.encode(text).ids[:MAX_TOKENS]]) for text in DOCUMENTS]
    with torch.no_grad():
        return [math.exp(network(input_ids=ids, labels=ids).loss.item()) for ids in inputs]


def test_scores_are_those_of_transformers(tmp_path: Path, model: Path, expected: list[float]) -> None:
    def scores(folder: Path) -> list[float]:
        score = load_scorer(Perplexity(model=str(folder), max_perplexity=10, max_tokens=MAX_TOKENS))
        assert score("") is None
        return [value for text in DOCUMENTS if (value := score(text)) is not None]

    assert scores(model) == pytest.approx(expected, rel=1e-4)
    assert scores(write_model(tmp_path / "other", seed=1)) != pytest.approx(expected, rel=1e-2)


def test_what_is_over_the_ceiling_is_dropped_and_counted(
    tmp_path: Path, model: Path, expected: list[float], make_corpus: Any, tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 3_000)
    file = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    ordered = sorted(expected)
    ceilings = {0: ordered[-1] * 1.01, 10: (ordered[9] + ordered[10]) / 2}
    for dropped, ceiling in ceilings.items():
        settings = {"model": str(model), "max_perplexity": ceiling, "max_tokens": MAX_TOKENS}
        corpus = make_corpus(file, filters={"perplexity": settings})
        assert len(sources.plan_units(corpus)) > 2
        outcome = preprocess(corpus, workers=1, overwrite=True)
        assert outcome.rejects == ({"perplexity": dropped} if dropped else {})
        stay = [text for text, value in zip(DOCUMENTS, expected, strict=True) if value <= ceiling]
        assert decoded(corpus.output_prefix, tokenizer_dir) == stay and len(stay) == len(DOCUMENTS) - dropped
    alone = bin_path(corpus.output_prefix).read_bytes()
    preprocess(corpus, workers=2, overwrite=True)
    assert bin_path(corpus.output_prefix).read_bytes() == alone
    listed = [json.loads(line) for line in Path(str(outcome.rejects_file)).read_text().splitlines()]
    assert all(float(entry["detail"].split(",")[0]) > ceiling for entry in listed)


def test_another_model_in_the_folder_is_another_plan(tmp_path: Path, make_corpus: Any) -> None:
    folder = write_model(tmp_path / "model", seed=0)
    settings = {"model": str(folder), "max_perplexity": 1e9, "max_tokens": MAX_TOKENS}
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS), filters={"perplexity": settings})
    preprocess(corpus, workers=1)
    assert preprocess(corpus, workers=1).already_done
    write_model(folder, seed=1)
    with pytest.raises(DataError, match="another input"):
        preprocess(corpus, workers=1)


def test_mistakes_are_named_before_a_document_is_read(
    tmp_path: Path, model: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def run(**settings: Any) -> None:
        preprocess(make_corpus(file, filters={"perplexity": {"max_perplexity": 100, **settings}}), workers=1)

    with pytest.raises(DataError, match=r"has no config\.json"):
        run(model=str(tmp_path))
    with pytest.raises(DataError, match=r"has no config\.json"):
        run(model=str(tmp_path / "none"))
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        run(model=str(tmp_path))
    with pytest.raises(DataError, match="more than the 64 positions"):
        run(model=str(model), max_tokens=65)
    with pytest.raises(ConfigError, match=r"max_perplexity"):
        run(model=str(model), max_perplexity=0.5)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match="needs the package transformers") as caught:
        run(model=str(model), max_tokens=MAX_TOKENS)
    assert "megatron-cpt[eval]" in str(caught.value.hint)


def test_weights_that_do_not_cover_the_model_are_refused(tmp_path: Path, make_corpus: Any) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_model(tmp_path / "model", seed=0)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"model": str(folder), "max_perplexity": 100, "max_tokens": MAX_TOKENS}
    with pytest.raises(DataError, match=r"do not fit its config\.json"):
        preprocess(make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS), filters={"perplexity": settings}), workers=1)
