"""One run of `preprocess`: units to workers, parts to datasets, and the files and the page beside them."""
