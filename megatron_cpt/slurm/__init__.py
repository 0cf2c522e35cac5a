"""Jobs on a Slurm cluster: their batch scripts, submission, what follows when one ends, and Slurm's view. No torch."""
