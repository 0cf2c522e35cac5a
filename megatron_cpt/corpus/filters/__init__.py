"""What happens to a document between reading and tokenising: cleaning, filters, decontamination, chunking."""
