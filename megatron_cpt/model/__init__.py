"""Architecture facts -> Megatron-Core's GPTModel, with weights from Hugging Face.

build.py      facts and config -> TransformerConfig -> GPTModel, one per pipeline chunk of this rank
spec.py       which modules a layer is made of: TransformerEngine's, or torch's with SDPA or unfused attention
attention.py  the core attention back ends outside TransformerEngine; block_causal.py is the CPU's
levers.py     fp8, optimizer offload and narrow moments, where the machine has them
load_hf.py    Hugging Face safetensors (or random weights) -> the slices of this rank, each proven set once
"""

from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

adapt_megatron_core_to_cpu()  # every module here imports Megatron-Core
