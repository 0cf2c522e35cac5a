"""The process a rank lives in: process groups, device, seeds, and Megatron-Core on a CPU."""
