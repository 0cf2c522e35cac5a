"""Raw text to verified `.bin/.idx` datasets: read, clean, deduplicate, tokenise, write. No torch anywhere."""
