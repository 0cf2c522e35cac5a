"""One rank of a model under a layout, for `RankPool`: scores the tokens of a file and writes what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


def main(argv: Sequence[str]) -> int:
    """Arguments: model, TP, PP, a file of tokens and lengths, where the answer goes, and a fault to plant."""
    model_dir, tp, pp, asked, answer, fault = argv
    from checkpoint_convert.open import open_checkpoint
    from megatron_cpt.eval.layout_model import Layout, eval_config, joined_ranks, open_layout_model

    found = open_checkpoint(Path(model_dir))
    config = eval_config(found, Layout(int(tp), int(pp)), 64, "fp32")
    with joined_ranks(config) as rank:
        model = open_layout_model(found, config)
        if fault == "padding":
            model._vocab_size = 1 << 20
        if rank != 0:
            model.serve()
            return 0
        told = torch.load(asked)
        likelihoods = model.likelihoods(told["inputs"], told["first"], told["labels"], told["rows"])
        logits = model.next_logits(told["inputs"], told["lengths"])
        model.release()
        torch.save((likelihoods.log_likelihood, likelihoods.is_greedy, logits), answer)
    return 0
