"""What a model is, without its weights: its facts, how its tensors are cut, and the families. No torch."""
