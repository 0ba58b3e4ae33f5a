"""TorchTitan's model converters (`model.converters`), which compute linear layers in float8.

They need an accelerator and are untested here. What is tested: that a machine or a job they cannot
work for is refused at start-up, and that the rows of each tower suit their matrix products.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torchtitan.components.quantization import (
    FP8_GROUP_ALIGNMENT_SIZE,
    MXFP8_GROUP_ALIGNMENT_SIZE,
)
from torchtitan.config import JobConfig
from torchtitan.protocols.model_converter import _registry_model_converter_cls
from torchtitan.tools.utils import has_cuda_capability, has_rocm_capability

# The weight gradient is a sum over rows, which float8 products take in multiples of these only.
ROW_MULTIPLES = {
    "quantize.linear.float8": FP8_GROUP_ALIGNMENT_SIZE,
    "quantize.linear.mx": MXFP8_GROUP_ALIGNMENT_SIZE,
}


def row_multiple(job_config: JobConfig) -> int:
    """Say of what number the rows of each tower must be a multiple for the job's converters."""
    return max((ROW_MULTIPLES.get(name, 1) for name in job_config.model.converters), default=1)


def check_converters(job_config: JobConfig, model_args: Any) -> None:
    """Check that the job's converters exist and that they suit the machine and the model.

    Args:
        job_config: The job's configuration.
        model_args: The model's arguments, complete.

    Raises:
        ValueError: Names the key, its value and the remedy.
    """
    names = job_config.model.converters
    for name in names:
        key = f"model.converters = {list(names)!r}"
        if name not in _registry_model_converter_cls:
            known = ", ".join(ROW_MULTIPLES)
            raise ValueError(f"{key}: {name!r} is unknown; known here: {known}.")
        if name.startswith("quantize.grouped_mm."):
            raise ValueError(
                f"{key}: {name!r} converts routed experts, and no family of this plugin has any; "
                f"remove it, or use {name.replace('grouped_mm', 'linear')!r}."
            )
        if name in ROW_MULTIPLES:
            _check_machine(job_config, name, key)
            _check_rows(job_config, model_args, name, key)
    if len({name for name in names if name in ROW_MULTIPLES}) > 1:
        raise ValueError(f"model.converters = {list(names)!r}: one kind of float8 at a time.")


def _check_machine(job_config: JobConfig, name: str, key: str) -> None:
    missing = []
    if name == "quantize.linear.mx":
        has_device = has_cuda_capability(10, 0) or has_rocm_capability(9, 5)
        device = "a GPU with MXFP8 (SM100, gfx950 or later)"
    else:
        is_compiled = job_config.compile.enable and "model" in job_config.compile.components
        is_emulated = job_config.quantize.linear.float8.emulate and not is_compiled
        has_device = has_cuda_capability(8, 9) or is_emulated
        device = "a GPU with float8 (SM89 or later)"
    if not has_device:
        missing.append(device)
    if find_spec("torchao") is None:
        missing.append("the package torchao (pip install torchao)")
    if missing:
        raise ValueError(
            f"{key}: {name!r} needs {' and '.join(missing)}, which this machine does not have; "
            f"run on one that has, or remove {name!r}."
        )


def _check_rows(job_config: JobConfig, model_args: Any, name: str, key: str) -> None:
    dispatch = getattr(model_args, "dispatch", "split")
    if dispatch != "split" and getattr(model_args, "is_untied", False):
        raise ValueError(
            f'mixture.dispatch = "{dispatch}": goes past the float8 layers that {key} asks for; '
            f'set "split", or remove {name!r}.'
        )
    # The output head sees the sequence itself, without padding rows.
    parts = job_config.parallelism.context_parallel_degree
    lengths = {"training": job_config.training.seq_len}
    if job_config.validation.enable:
        lengths["validation"] = job_config.validation.seq_len
    multiple = ROW_MULTIPLES[name] * parts
    for section, length in lengths.items():
        if length % multiple:
            raise ValueError(
                f"{section}.seq_len = {length}: {name!r} in model.converters needs a multiple of "
                f"{multiple}; use {length // multiple * multiple or multiple}."
            )
