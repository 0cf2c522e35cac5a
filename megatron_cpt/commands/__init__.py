"""The subcommands of `megatron-cpt`: they parse flags, call the library and print. No logic lives here."""
