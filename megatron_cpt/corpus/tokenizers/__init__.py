"""Text to token ids: one small interface, one back end per file format."""
