"""Checkpoints between Hugging Face and Megatron: torch_dist and legacy, streamed, proven, without Megatron.

What a model is, its families and the arithmetic between the two row orders lie in `megatron_cpt.architecture`.

checkpoint.py  what every format is reduced to: tensors, and the extents of files where their rows lie
open.py        from a path to a checkpoint: format, config.json, which iteration
hf.py  torch_dist.py  legacy.py          readers (hf.py writes too): find the extents, read no weight
torch_dist_writer.py  legacy_writer.py   writers: plan a Target (target.py)
archive.py  dcp_index.py  torch.save archives of one tensor and the `.metadata` index, without torch
state_file.py  whole state dicts of torch.save, opened by an allow-list and filled in place
megatron_config.py  megatron_args.py     config.json from what Megatron stored, and the reverse
stream.py      copy, hash and inspect blocks of rows (rows.py: the I/O) in threads
convert.py     one conversion from start to receipt; resume.py keeps what a killed one finished
verify.py      are two checkpoints the same model? forward.py computes logits with the weights on disk
"""
