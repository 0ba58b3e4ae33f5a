"""Ranks of distributed tests: processes that have imported all they need."""

from torchtitan_mixtures.local_ranks import free_port, preload, run_ranks

__all__ = ["free_port", "run_ranks"]

preload("tests.gang", "tests.runs")
