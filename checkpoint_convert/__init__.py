"""Checkpoints between Hugging Face and Megatron: torch_dist and legacy, streamed, proven, without Megatron.

families/      one short file per model family: config.json -> Architecture, and its name table
mapping.py     Hugging Face rows <-> Megatron rows, for whole tensors and for one TP rank's slice
checkpoint.py  what every format is reduced to: tensors, and the extents of files where their rows lie
sources.py     from a path to a checkpoint: format, config.json, which iteration
hf.py  torch_dist.py  legacy.py          readers (hf.py writes too): find the extents, read no weight
torch_dist_writer.py  legacy_writer.py   writers: plan a Target (target.py)
archive.py  index.py      torch.save archives of one tensor and the `.metadata` index, without torch
state_file.py  whole state dicts of torch.save, opened by an allow-list and filled in place
megatron_config.py  megatron_args.py     config.json from what Megatron stored, and the reverse
stream.py      copy, hash and inspect blocks of rows (rows.py: the I/O) in threads
convert.py     one conversion from start to receipt; partial.py keeps what a killed one finished
verify.py      are two checkpoints the same model? forward.py computes logits with the weights on disk
"""
