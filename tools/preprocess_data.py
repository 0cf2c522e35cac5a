"""Megatron-LM's preprocess_data.py habits: the same flags give the same files, byte for byte, and a manifest.

    python tools/preprocess_data.py --input a.jsonl --output-prefix out/a --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model MODEL_DIR --append-eod --workers 8        ->  out/a_text_document.bin/.idx

As Megatron-LM (core_v0.16.1) does: one dataset per JSON key; special tokens spelled in the text become ids, but by the
SentencePiece types only where --legacy-tokenizer meets SentencePieceTokenizer; empty documents are kept; the end of a
document is the tokenizer's own eos_token, even one that ends a chat turn; its beginning-of-sequence token is added
only with --tokenizer-hf-include-special-tokens or, for HuggingFace and Llama2, --legacy-tokenizer. Unlike it: any
unreadable line fails the run unless --max-reject-ratio allows it, a document that the tokenizer itself ends with the
end of document is not given a second one, and no token is appended to a SentencePiece vocabulary (a warning says so).
"""

from __future__ import annotations

import logging

import click

from megatron_cpt.cli import run
from megatron_cpt.commands.preprocess import outcome_text, unit_progress
from megatron_cpt.console import print_summary
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema import parse_corpus
from megatron_cpt.corpus.tokenizers.load import find_tokenizer_file, load_tokenizer
from megatron_cpt.corpus.tokenizers.stated_tokens import read_stated_tokens
from megatron_cpt.corpus.tokenizers.tokenizer import CHAT_TURN_TOKENS
from megatron_cpt.errors import ConfigError, DataError

log = logging.getLogger(__name__)

LEGACY_EOD = "<EOD>"
TOKENIZER_TYPES = ["HuggingFaceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"]


@click.command()
@click.option("--input", "inputs", required=True, help="jsonl file or glob.")
@click.option("--output-prefix", required=True, help="Gives PREFIX_KEY_document.bin and .idx for each key.")
@click.option("--tokenizer-type", type=click.Choice(TOKENIZER_TYPES), default="HuggingFaceTokenizer", show_default=True)
@click.option("--tokenizer-model", required=True, help="Model folder or tokenizer file.")
@click.option("--json-keys", default="text", show_default=True, help="Keys to extract; further ones may follow.")
@click.option("--tokenizer-hf-include-special-tokens", "include_special", is_flag=True, help="Add BOS where HF does.")
@click.option("--tokenizer-hf-use-fast", is_flag=True, help="Accepted; the fast tokenizer is always used.")
@click.option("--legacy-tokenizer", is_flag=True, help="HF and Llama2 add BOS; SentencePiece parses control pieces.")
@click.option("--append-eod", is_flag=True, help="End each document with the end-of-document token.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]")
@click.option("--partitions", default=1, help="Accepted and not needed: memory does not grow with the input.")
@click.option("--log-interval", default=1000, help="Accepted; progress is shown by time.")
@click.option("--keep-sequential-samples", is_flag=True, help="Accepted; the order of the input is always kept.")
@click.option("--eod-token", help="End-of-document token.  [default: the tokenizer's eos_token]")
@click.option("--max-reject-ratio", default=0.0, show_default=True, help="Allowed ratio of unreadable lines.")
@click.option("--overwrite", is_flag=True, help="Replace datasets of another input or tokenizer.")
@click.argument("more_keys", nargs=-1)
def main(
    inputs: str,
    output_prefix: str,
    tokenizer_type: str,
    tokenizer_model: str,
    json_keys: str,
    include_special: bool,
    tokenizer_hf_use_fast: bool,
    legacy_tokenizer: bool,
    append_eod: bool,
    workers: int | None,
    partitions: int,
    log_interval: int,
    keep_sequential_samples: bool,
    eod_token: str | None,
    max_reject_ratio: float,
    overwrite: bool,
    more_keys: tuple[str, ...],
) -> None:
    """Tokenise jsonl with Megatron-LM's flags."""
    if legacy_tokenizer and tokenizer_type == "TikTokenizer":
        raise ConfigError(f"--legacy-tokenizer is not there for {tokenizer_type}", hint="leave it out")
    adds_bos = legacy_tokenizer and tokenizer_type in ("HuggingFaceTokenizer", "Llama2Tokenizer")
    is_huggingface = tokenizer_type == "HuggingFaceTokenizer"
    is_legacy_sentencepiece = legacy_tokenizer and tokenizer_type == "SentencePieceTokenizer"
    parses = is_huggingface or tokenizer_type == "TikTokenizer" or is_legacy_sentencepiece
    if is_huggingface and eod_token is None:
        eod_token = own_eos(tokenizer_model)
    if is_legacy_sentencepiece and eod_token is None:
        eod_token = legacy_eod(tokenizer_model)
    for key in (json_keys, *more_keys):
        raw = {
            "output_prefix": f"{output_prefix}_{key}_document",
            "tokenizer": tokenizer_model,
            "eod_token": eod_token,
            "append_eod": append_eod,
            "special_tokens_in_text": "parse" if parses else "literal",
            "post_processor": adds_bos or (include_special and is_huggingface),
            "keep_empty_documents": True,
            "max_reject_ratio": max_reject_ratio,
            "sources": [{"files": [inputs], "text": key, "format": "jsonl"}],
        }
        with unit_progress() as start:
            outcome = preprocess(parse_corpus(raw, "flags"), workers=workers, overwrite=overwrite, start_progress=start)
        print_summary(outcome_text(outcome))


def own_eos(model: str) -> str | None:
    """The eos_token that the tokenizer's configuration states: Megatron-LM's end of document."""
    eos = read_stated_tokens(find_tokenizer_file(model).parent).eos
    if eos in CHAT_TURN_TOKENS:
        log.warning("documents end with %r, as Megatron-LM has it; for a base model state another --eod-token", eos)
    return eos


def legacy_eod(model: str) -> str | None:
    """The `<EOD>` of Megatron-LM's legacy SentencePieceTokenizer, where the model has it; else its own eos."""
    try:
        return load_tokenizer(model, eod_token=LEGACY_EOD).eod_token
    except DataError:
        own = load_tokenizer(model)
    log.warning(
        "documents end with %r = %d; Megatron-LM's legacy tokenizer appends an %s to the %d pieces, an id without "
        "a row in the model", own.eod_token, own.eod_id, LEGACY_EOD, own.vocab_size,
    )  # fmt: skip
    return None


if __name__ == "__main__":
    run(main)
