"""What surrounds a job: where the model's files are, the run folder, the processes. No torch, no megatron."""
