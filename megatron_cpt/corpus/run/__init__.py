"""One run of `preprocess`: units to workers, parts to datasets, and the account of it."""
