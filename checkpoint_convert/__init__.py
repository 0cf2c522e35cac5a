"""Checkpoints between Hugging Face and Megatron: torch_dist and legacy, streamed, proven, without Megatron.

families/   one short file per model family: config.json -> Architecture, and its name table
mapping.py  Hugging Face rows <-> Megatron rows, for whole tensors and for one TP rank's slice
"""
