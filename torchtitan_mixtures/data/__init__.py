"""Corpora, tokenizers, packing and loading: everything between a file and a batch."""
