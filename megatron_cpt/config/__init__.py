"""The run's configuration: schema, loading, and what is derived from it. No torch, no megatron."""
