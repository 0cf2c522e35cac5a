"""Continued pre-training of large language models on Megatron-Core, driven by token budgets."""

__version__ = "0.1.0"
