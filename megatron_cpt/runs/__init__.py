"""A run on disk: its folder, lease, checkpoints, metrics and status. No torch; command line, Slurm and web read it."""
