"""Files in, batches of documents out."""
