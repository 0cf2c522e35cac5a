"""Our adapter gives lm-eval what its own `hf` model gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.eval.hf_model import open_hf_model

pytest.importorskip("lm_eval", reason="needs lm-eval: make setup, or pip install 'megatron-cpt[tasks]'")

LENGTH = 64
PAIRS = [
    ("the cat sat on", " the mat"), ("the cat sat on", " the dog"), ("", "a dog"), ("a", "b"), ("a", "c"),
    ("the dog sat " * 12, "on a cat"), ("x", "the cat and the dog " * 2), ("question ", " answer"),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(model_dir: Path) -> tuple[Any, Any]:
    """Ours and lm-eval's."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from megatron_cpt.eval.harness_model import HarnessModel

    tokenizer = load_tokenizer(model_dir, special_tokens_in_text="parse")
    ours = HarnessModel(open_hf_model(model_dir), tokenizer, LENGTH, tokens_per_forward=100)
    theirs = HFLM(
        AutoModelForCausalLM.from_pretrained(model_dir),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(model_dir / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        ),
        max_length=LENGTH,
        batch_size=1,
        device="cpu",
    )
    return ours, theirs


def _requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=0, metadata=("task", number, 1))
        for number, given in enumerate(arguments)
    ]


def test_log_likelihoods_and_greedy_flags_are_those_of_lm_eval(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    greedy = theirs.generate_until(_requests("generate_until", [("the cat", {"until": ["\n\n"], "max_gen_toks": 2})]))
    requests = _requests("loglikelihood", [*PAIRS, ("the cat", greedy[0])])
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [flag for _, flag in found] == [flag for _, flag in wanted]
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, wanted, strict=True)) < 1e-3
    assert ours.truncated_items["task"] == 1


def test_an_answer_longer_than_the_sequence_is_scored_at_its_end_and_counted(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    before, answer = ours.truncated_items["task"], "thecatandthedog" * 9
    ((nats, _),) = ours.loglikelihood(_requests("loglikelihood", [("a",) * 2] * 6 + [("x", answer)])[6:])
    end = answer[-LENGTH - 1 :]  # a token a byte
    ((wanted, _),) = theirs.loglikelihood(_requests("loglikelihood", [(end[0], end[1:])]), disable_tqdm=True)
    assert abs(nats - wanted) < 1e-3
    assert ours.truncated_items["task"] == before + 1


def test_rolling_log_likelihoods_are_those_of_lm_eval(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    requests = _requests("loglikelihood_rolling", [("the cat sat",), ("the dog sat on a cat " * 9,), ("a",)])
    found, wanted = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-3
    assert min(wanted) < -100


def test_generated_texts_are_those_of_lm_eval(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    plain = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = ["the cat sat", "a dog", "the dog sat on a cat " * 5]
    wanted = theirs.generate_until(_requests("generate_until", [(text, plain) for text in prompts]), disable_tqdm=True)
    assert ours.generate_until(_requests("generate_until", [(text, plain) for text in prompts])) == wanted
    stop = wanted[1][2:4]
    cut = ours.generate_until(_requests("generate_until", [(prompts[1], plain | {"until": stop})]))
    assert cut == [wanted[1].split(stop)[0]]
