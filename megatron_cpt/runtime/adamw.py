"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) with the state layout of apex and TransformerEngine.

Megatron-Core takes TransformerEngine's or apex's FusedAdam where one is installed and torch's AdamW
otherwise, but its distributed optimizer cannot reload torch's: that one counts steps per parameter, the
other two per group. This one counts per group and runs torch's own fused kernel (CPU and CUDA).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class FusedAdamW(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        **unused: Any,  # master_weights and the like of TransformerEngine are refused by Megatron-Core before
    ) -> None:
        assert adam_w_mode, "decoupled weight decay only"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            # The kernel adds one to the count before it uses it.
            step = [torch.tensor(group["step"] - 1.0, device=p.device) for p in params]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                step,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def select_adam() -> str:
    """Let Megatron-Core use the best AdamW installed; return its name: `te`, `apex` or `torch`.

    TransformerEngine's and apex's are found by Megatron-Core itself; only torch's needs this replacement.
    """
    if torch.cuda.is_available():
        for name, module in (("te", "transformer_engine"), ("apex", "apex")):
            if importlib.util.find_spec(module) is not None:
                return name
    import megatron.core.optimizer as engine
    from megatron.core.optimizer import distrib_optimizer

    engine.Adam, engine.USING_PYTORCH_OPTIMIZER = FusedAdamW, False
    # The flags say "step is kept per group", which is what apex and TransformerEngine do.
    distrib_optimizer.Adam = FusedAdamW
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    return "torch"
