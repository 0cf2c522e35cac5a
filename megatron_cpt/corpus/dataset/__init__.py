"""Finished `.bin/.idx` datasets: format, manifest, and the tools that work on them."""
