"""Per-tower keys of `[mixture]`: how they are written, what is refused, and what they change."""

from __future__ import annotations

import logging

import pytest
import torch
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import TRAIN_CONFIGS, debug_job, load_job
from tests.unit.test_checkpoint_config import check, make_checkpoint
from torchtitan_mixtures.checks import CHECKED, check_arguments, check_job
from torchtitan_mixtures.job_config import Mixture
from torchtitan_mixtures.models.mot import mot_args

KEYS = """
[mixture]
tower_lr = { text = 1, image = 3e-3 }
tower_weight_decay = { shared = 0.0 }
frozen_towers = ["text"]
"""


def write(tmp_path, keys):
    path = tmp_path / "job.toml"
    path.write_text((TRAIN_CONFIGS / "mot" / "debugmodel.toml").read_text() + keys)
    return path


def test_a_toml_sets_them_and_the_command_line_replaces_them(tmp_path):
    path = write(tmp_path, KEYS)
    check_arguments(["--job.config_file", str(path)])
    mixture = load_job(path).mixture
    assert mixture.tower_lr == {"text": 1, "image": 3e-3}
    assert mixture.tower_weight_decay == {"shared": 0.0}
    assert mixture.frozen_towers == ["text"]
    mixture = load_job(
        path, "--mixture.tower_lr=text=0.5,shared=1e-4", "--mixture.tower_weight_decay", "image=2"
    ).mixture
    assert mixture.tower_lr == {"text": 0.5, "shared": 1e-4}
    assert mixture.tower_weight_decay == {"image": 2.0}
    assert load_job(path, "--mixture.tower_lr=").mixture.tower_lr == {}
    assert debug_job("mot", "--mixture.tower_lr=image=0.1").mixture.tower_lr == {"image": 0.1}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('tower_lr = { text = "low" }', r"mixture\.tower_lr = .*must be a table from names to a n"),
        ("tower_lr = 0.1", r"mixture\.tower_lr = 0\.1: must be a table"),
        ("tower_weight_decay = { text = true }", r"mixture\.tower_weight_decay = .*must be a t"),
        ('frozen_towers = "text"', r"mixture\.frozen_towers = 'text': must be a list"),
    ],
)
def test_values_of_other_types_are_refused(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(["--job.config_file", str(write(tmp_path, f"[mixture]\n{keys}\n"))])


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["tower_lr", "tower_weight_decay"])
def test_negative_and_endless_numbers_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"mixture\.{key} = .*'image' must be a finite number"):
        Mixture(**{key: {"text": 1.0, "image": value}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tower_lr=speech=1"], r"tower_lr = {'speech': 1\.0}: 'speech' is not a tower of model\.f"
                                r"lavor = 'debugmodel'; it has text, image, shared"),
        (["tower_weight_decay=txt=1"], r"tower_weight_decay.*'txt' is not a tower"),
        (["frozen_towers=text,pictures"], r"frozen_towers.*'pictures' is not a tower"),
        (["frozen_towers=text,image,shared"], r"frozen_towers = .*nothing is left to train"),
        (["frozen_towers=text,image", "untie=ffn"], None),
        (["tower_lr=text=1,image=2", "tower_of_modality", "0", "1"], None),
        (["tower_lr=image=1", "tower_of_modality", "0", "0"], r"tower_lr = .*no layers of several"),
        (["frozen_towers=shared", "untie=none"], r"frozen_towers = \['shared'\].*no layers of sev"),
    ],
)  # fmt: skip
def test_names_must_be_those_of_towers_and_one_must_be_trained(overrides, message, tmp_path):
    options = [f"--mixture.{o}" if not o.isdigit() else o for o in overrides]
    job = debug_job("mot", f"--job.dump_folder={tmp_path}", *options)
    if message is None:
        check_job(job)
    else:
        with pytest.raises(ValueError, match=message):
            check_job(job)


def test_a_dense_flavour_has_no_towers(tmp_path):
    job = debug_job(
        "mot", "--model.flavor=debugmodel_dense", "--mixture.tower_lr=text=1",
        f"--job.dump_folder={tmp_path}",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"mixture\.tower_lr = .*'debugmodel_dense' has no layers"):
        check_job(job)


def test_optimizers_in_the_backward_pass_are_refused(tmp_path):
    job = debug_job(
        "mot", "--optimizer.early_step_in_backward", "--mixture.tower_lr=text=1",
        f"--job.dump_folder={tmp_path}",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"early_step_in_backward = true and mixture\.tower_lr"):
        check_job(job)


def test_a_pipeline_stage_must_have_something_to_train(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = debug_job(
        "mot", "--parallelism.pipeline_parallel_degree=2", "--mixture.frozen_towers=shared",
        f"--job.dump_folder={tmp_path}",
    )  # fmt: skip
    check_job(job)
    setattr(job, CHECKED, False)
    layers = [f"layers.{i}" for i in range(6)]
    job.parallelism.module_fqns_per_model_part = [["tok_embeddings"], [*layers, "norm", "output"]]
    with pytest.raises(ValueError, match=r"frozen_towers = \['shared'\].* stage of tok_embeddings"):
        check_job(job)


def test_our_trainer_is_asked_for(tmp_path):
    job = debug_job("mot", "--mixture.frozen_towers=text", f"--job.dump_folder={tmp_path}")
    spec = get_train_spec("mot")
    args = spec.model_args["debugmodel"]
    args.update_from_config(job)
    dims = ParallelDims(1, 1, 1, 1, 1, 1, 1, 1)
    with torch.device("meta"):
        model = spec.model_cls(args)
    with pytest.raises(ValueError, match=r"a key per tower needs our trainer"):
        spec.parallelize_fn(model, dims, job)
    check_job(job)
    spec.parallelize_fn(model, dims, job)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".text." in name}


@pytest.mark.parametrize(
    ("third", "frozen", "warns"),
    [("speech", "", False), ("video", "", True), ("video", "video", False)],
)
def test_a_modality_without_codes_is_warned_of(third, frozen, warns, tmp_path, caplog, monkeypatch):
    args = get_train_spec("mot").model_args["debugmodel_3modality"]
    args.modality_names = ["text", "image", third]
    monkeypatch.setitem(mot_args._table, "debugmodel_3modality", args)
    options = ["--model.flavor=debugmodel_3modality", f"--job.dump_folder={tmp_path}"]
    options += [f"--mixture.frozen_towers={frozen}"] if frozen else []
    job = debug_job("mot", *options)
    with caplog.at_level(logging.WARNING):
        check_job(job)
    messages = [r.message for r in caplog.records if "no batch has a token" in r.message]
    assert len(messages) == warns
    for message in messages:
        assert "'video'" in message and "multimodal.video_tokenizer" in message
        assert 'mixture.frozen_towers = ["video"]' in message


OLD = ("--mixture.tower_lr=image=1e-3,text=1", "--mixture.frozen_towers=text")


def test_a_checkpoint_goes_on_with_the_values_it_has(tmp_path):
    make_checkpoint(tmp_path, 3, *OLD)
    check(tmp_path, "--mixture.tower_lr=text=1,image=1e-3", OLD[1])
    check(tmp_path, *OLD[:1], "--mixture.frozen_towers=text,shared")  # its state is left out
    for options, message in (
        (["--mixture.tower_lr=image=2e-3,text=1", OLD[1]], r"tower_lr = .*it was .*lr_scheduler"),
        ([OLD[1]], r"tower_lr = {}: it was {'image': 0\.001"),
        ([*OLD, "--mixture.tower_weight_decay=text=0"], r"tower_weight_decay = .*it was {} in"),
        ([OLD[0]], r"frozen_towers = \[\]: it was \['text'\] in .*step-3.*no optimizer state"),
    ):
        with pytest.raises(ValueError, match=message):
            check(tmp_path, *options)
    afresh = "--checkpoint.exclude_from_loading=optimizer"
    check(tmp_path, OLD[0], afresh)
    with pytest.raises(ValueError, match="tower_lr"):
        check(tmp_path, afresh)
    check(tmp_path, f"{afresh},lr_scheduler")
    check(
        tmp_path, f"--checkpoint.initial_load_path={tmp_path}/checkpoint/step-3",
        "--checkpoint.folder=other",
    )  # fmt: skip
