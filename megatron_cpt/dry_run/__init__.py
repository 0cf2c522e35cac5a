"""Every rank of a run's layout in one CPU process: the real model on the meta device, over a fake backend."""
