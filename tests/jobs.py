"""Job configurations for tests, made the way users make them: a TOML and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro._docstrings
from torchtitan.config import ConfigManager

# What --help would print is read out of source files, which takes every new process a second. Here
# nothing prints it; the commands of tests/e2e are processes of their own.
tyro._docstrings.get_field_docstring = lambda *_: None

ROOT = Path(__file__).parent.parent
TRAIN_CONFIGS = ROOT / "train_configs"


def all_configs() -> list[Path]:
    """List every TOML of the repository."""
    return sorted(TRAIN_CONFIGS.glob("*/*.toml"))


def load_job(config: Path, *overrides: str) -> Any:
    """Parse a TOML with TorchTitan's own manager, as `torchtitan.train` would."""
    return ConfigManager().parse_args([f"--job.config_file={config}", *overrides])


def debug_job(family: str, *overrides: str) -> Any:
    """Parse a family's debug configuration, small enough for a test of a few seconds."""
    small = (
        "--training.seq_len=256",
        "--training.local_batch_size=2",
        "--validation.seq_len=256",
        "--metrics.log_freq=1",
        "--sampling.interval=0",  # not in every layout, and not for nothing
    )
    return load_job(TRAIN_CONFIGS / family / "debugmodel.toml", *small, *overrides)
