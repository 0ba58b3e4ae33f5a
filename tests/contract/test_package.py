"""What holds for the package as a whole."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torchtitan

from tests.jobs import ROOT, TRAIN_CONFIGS
from torchtitan_mixtures.models import FAMILIES

PACKAGE = ROOT / "torchtitan_mixtures"


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_does_not_import_the_trainer():
    # `-m torchtitan.train` runs that file as __main__; importing it too would make a second copy.
    code = "import sys, torchtitan_mixtures.job_config; print('torchtitan.train' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_families_are_the_folders_that_exist():
    folders = {p.parent.name for p in (PACKAGE / "models").glob("*/model.py")} - {"common"}
    configs = {p.name for p in TRAIN_CONFIGS.iterdir() if p.is_dir()}
    assert set(FAMILIES) == folders == configs


@pytest.mark.parametrize("first", ["torchtitan.components.validate", "torchtitan_mixtures"])
def test_without_accelerator_torchtitan_is_pointed_at_the_cpu_in_any_order(first):
    code = (
        f"import {first}, torchtitan_mixtures.device, torchtitan.train, sys\n"
        "copies = {m.device_type for n, m in sys.modules.items()\n"
        "          if n.startswith('torchtitan.') and hasattr(m, 'device_type')}\n"
        "assert len(copies) == 1, copies\n"
        "expected = torchtitan_mixtures.device.has_accelerator()\n"
        "assert (copies == {'cpu'}) != expected, copies\n"
    )
    run_python(code)


# Everything of the host that the package builds on. An upgrade of TorchTitan fails here first.
HOST_API = {
    "torchtitan.train:Trainer.__init__": ["self", "job_config"],
    "torchtitan.train:Trainer.train": ["self"],
    "torchtitan.train:Trainer.train_step": ["self", "data_iterator"],
    "torchtitan.train:Trainer.forward_backward_step": [
        "self",
        "input_dict",
        "labels",
        "global_valid_tokens",
    ],
    "torchtitan.train:Trainer.post_dataloading_process": ["self", "input_dict", "labels"],
    "torchtitan.train:Trainer.close": ["self"],
    "torchtitan.config:ConfigManager.parse_args": ["self", "args"],
    "torchtitan.config:ConfigManager._merge_configs": ["base", "custom"],
    "torchtitan.components.checkpoint:CheckpointManager.save": ["self", "curr_step", "last_step"],
    "torchtitan.components.checkpoint:CheckpointManager._should_save": [
        "self",
        "curr_step",
        "last_step",
    ],
    "torchtitan.components.checkpoint:CheckpointManager._create_checkpoint_id": [
        "self",
        "step",
        "folder",
    ],
    "torchtitan.components.optimizer:build_optimizers": [
        "model_parts",
        "optimizer_config",
        "parallel_dims",
        "ft_manager",
    ],
    "torchtitan.components.optimizer:OptimizersContainer.__init__": [
        "self",
        "model_parts",
        "optimizer_cls",
        "optimizer_kwargs",
    ],
    "torchtitan.components.metrics:MetricsProcessor.__init__": [
        "self",
        "job_config",
        "parallel_dims",
        "tag",
    ],
    "torchtitan.components.metrics:MetricsProcessor.log": [
        "self",
        "step",
        "global_avg_loss",
        "global_max_loss",
        "grad_norm",
        "extra_metrics",
    ],
    "torchtitan.components.validate:BaseValidator.validate": ["self", "model_parts", "step"],
    "torchtitan.distributed.activation_checkpoint:apply_ac": [
        "model",
        "ac_config",
        "model_compile_enabled",
        "op_sac_save_list",
        "base_folder",
    ],
    "torchtitan.distributed.pipeline_parallel:build_pipeline_schedule": [
        "job_config",
        "stages",
        "loss_fn",
    ],
    "torchtitan.distributed.pipeline_parallel:generate_llm_fqn_per_model_part": [
        "num_stages",
        "num_layers",
        "input_weight",
        "output_weight",
    ],
    "torchtitan.distributed.pipeline_parallel:pipeline_module_split": [
        "whole_model",
        "pp_mesh",
        "pp_schedule",
        "device",
        "module_names_per_stage",
    ],
    "torchtitan.distributed.context_parallel:apply_cp_to_attention_module": [
        "attention_modules",
        "cp_mesh",
        "attention_type",
    ],
    "torchtitan.distributed.context_parallel:cp_shard": [
        "cp_mesh",
        "inputs",
        "attention_masks",
        "load_balancer_type",
        "input_seq_dim",
    ],
    "torchtitan.tools.utils:get_device_info": [],
    "torchtitan.protocols.train_spec:register_train_spec": ["name", "train_spec"],
    "torchtitan.protocols.train_spec:get_train_spec": ["name"],
    "torchtitan.tools.utils:get_peak_flops": ["device_name"],
}


@pytest.mark.parametrize("path", HOST_API)
def test_the_host_has_the_interface_that_is_built_on(path):
    module, _, name = path.partition(":")
    value = __import__(module, fromlist=["_"])
    for part in name.split("."):
        value = getattr(value, part)
    assert list(inspect.signature(value).parameters) == HOST_API[path]


def test_the_host_is_the_version_that_is_pinned():
    assert torchtitan.__version__ == "0.2.2"


ALLOWED_HOST_MODULES = (
    "components",
    "config",
    "distributed",
    "protocols",
    "tools",
    "train",
    "models.attention",
    "models.moe",
    "models.utils",
)


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_files(folder: str = "") -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def test_only_the_stable_parts_of_the_host_are_imported():
    for path in package_files():
        for name in imports_of(path):
            if name.startswith("torchtitan."):
                part = name.removeprefix("torchtitan.")
                assert part.startswith(ALLOWED_HOST_MODULES), f"{path.name} imports {name}"


def test_layers_of_the_package_do_not_import_upwards():
    for path in package_files("data") + package_files("objectives"):
        assert not any("torchtitan_mixtures.models" in name for name in imports_of(path)), path
    for family in FAMILIES:
        for other in set(FAMILIES) - {family}:
            for path in package_files(f"models/{family}"):
                assert not any(f"models.{other}" in name for name in imports_of(path)), path
    for path in package_files("models/common"):
        for family in FAMILIES:
            assert not any(f"models.{family}" in name for name in imports_of(path)), path
            assert family not in path.read_text().lower().split(), f"{path} names {family}"
