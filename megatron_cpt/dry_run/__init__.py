"""Every rank of a run's layout in one CPU process: the real model on the meta device, over a fake backend.

Import it where no GPU is seen: Megatron-Core is adapted to the CPU, here as in `megatron_cpt.model`.
"""

from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

adapt_megatron_core_to_cpu()
