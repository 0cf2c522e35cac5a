"""Tokenised datasets -> training samples: which source, which tokens, in which order, and what was consumed."""
