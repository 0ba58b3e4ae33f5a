"""Corpora that ship inside the package, and the builders that made them."""
