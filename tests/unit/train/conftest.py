"""Megatron-Core is adapted to the CPU before a test here imports it, also when one file is run alone."""

import megatron_cpt.model  # noqa: F401
