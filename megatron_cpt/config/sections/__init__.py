"""The sections of a run's config: one file holds one section and the rules that it shares with the others."""
