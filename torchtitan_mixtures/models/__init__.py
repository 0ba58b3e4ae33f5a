"""The model families that have landed."""

FAMILIES = ("mot", "mom", "mone", "mmdit", "mixdiff")
