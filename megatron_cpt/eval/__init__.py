"""Measuring models after (and before) training."""
