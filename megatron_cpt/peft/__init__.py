"""Adapters that are trained in place of the weights, inside Megatron-Core's linear layers."""
