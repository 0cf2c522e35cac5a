"""Duplicate documents and repeated passages over a whole corpus."""
