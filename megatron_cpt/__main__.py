"""`python -m megatron_cpt` is `megatron-cpt`; torchrun starts the ranks of a job through it."""

from megatron_cpt.cli import main

if __name__ == "__main__":
    main()
