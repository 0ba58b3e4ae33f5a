"""What a classifier cannot use, or have, is refused before any work."""

import pytest
from PIL import Image
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import debug_job
from torchtitan_mixtures import device
from torchtitan_mixtures.checks import check_data, check_job
from torchtitan_mixtures.classifier_checks import check_classifier
from torchtitan_mixtures.classifier_config import Nested
from torchtitan_mixtures.objectives.classification import lengthen_to_same_flops

DENSE = (
    "--model.flavor=debugmodel_dense",
    "--nested.capacity=-1",
    "--nested.validation_capacities",
)
CAPACITIES = "--nested.validation_capacities"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--mixture.top_k=1"], r"mixture\.top_k = 1: model\.name = 'mone' has no mixers"),
        (["--mixture.context_parallel=ring"], r"mixture\.context_parallel = 'ring': .* no mixers"),
        (["--objective.kind=flow"], r"objective\.kind = 'flow': .*'mone' has no noise to remove"),
        (["--sampling.interval=5"], r"sampling\.interval = 5: .* draws none; set it to 0"),
        (["--multimodal.train_split=all"], r"multimodal\.train_split: .* has no split \"all\""),
        (["--multimodal.validation_splits=val"], r"multimodal\.validation_splits: .* \"val\""),
        (
            ["--training.local_batch_size=3", "--classification.cutmix=1.0"],
            r"local_batch_size = 3: must be even with classification\.cutmix = 1\.0",
        ),
        ([CAPACITIES, "0.5", "0.1"], r"validation_capacities = \[0\.5, 0\.1\]: 0\.1 is not"),
        (
            ["--nested.schedule=adaptive", "--nested.capacities", "0.12", "0.5"],
            r"nested\.capacities = \[0\.12, 0\.5\]: 0\.12 is not possible: .* from 0\.125 to 1",
        ),
        (["--nested.capacity=0.05"], r"nested\.capacity = 0\.05"),
        (
            ["--nested.schedule=linear", "--nested.start_capacity=0.4"],
            r"start_capacity = 0\.4: must be nested\.capacity = 0\.5 or more",
        ),
        (
            ["--nested.allocation=uniform", "--nested.capacity=-1", CAPACITIES, "0.3"],
            r"validation_capacities = \[0\.3\]: .* allocation = 'uniform' has an effective capa",
        ),
        (["--nested.routing=argmax", "--nested.capacity=0.3"], r"capacity = 0\.3: with nested"),
        (["--nested.routing=argmax", "--nested.schedule=adaptive"], r"schedule = 'adaptive': with"),
        ([*DENSE, "--nested.same_flops"], r"same_flops = True: model\.flavor = 'debugmodel_dense'"),
        ([*DENSE[:2], CAPACITIES, "1.0"], r"validation_capacities = \[1\.0\]: .* has no nested"),
    ],
)  # fmt: skip
def test_a_classifier_that_cannot_work_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_data(debug_job("mone", "--validation.enable", *overrides))


def test_a_classifier_reads_pixels(tmp_path):
    args = get_train_spec("mone").model_args["debugmodel"]
    message = r"multimodal\.vae = 'somewhere': model\.name = 'mone' classifies pixels; remove"
    with pytest.raises(ValueError, match=message):
        check_classifier(debug_job("mone", "--multimodal.vae=somewhere"), args)
    (tmp_path / "latents.json").write_text("{}")
    job = debug_job("mone", "--multimodal.source=folder", f"--multimodal.path={tmp_path}")
    with pytest.raises(ValueError, match=r"multimodal\.path = .*: holds latents, but"):
        check_classifier(job, args)


@pytest.mark.parametrize("family", ["mot", "mom"])
def test_other_families_have_neither_classes_nor_nested_experts(family):
    with pytest.raises(ValueError, match=r"nested\.capacity = 0\.5: .* has no nested experts"):
        check_data(debug_job(family, "--nested.capacity=0.5"))
    message = r"classification\.mixup = 0\.1: .* has no classes to predict"
    with pytest.raises(ValueError, match=message):
        check_data(debug_job(family, "--classification.mixup=0.1"))


def test_kernels_for_a_gpu_need_one(monkeypatch):
    job = debug_job("mone", "--nested.kernels=triton")
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    with pytest.raises(ValueError, match=r'nested\.kernels = "triton": needs a GPU'):
        check_data(job)
    monkeypatch.setattr(device, "has_accelerator", lambda: True)
    check_data(job)


@pytest.mark.parametrize("overrides", [(), DENSE, ("--nested.schedule=adaptive",)])
def test_what_can_work_passes(overrides, tmp_path):
    check_job(debug_job("mone", f"--job.dump_folder={tmp_path}", *overrides))


def test_a_job_is_lengthened_to_the_same_multiply_adds_once():
    job = debug_job("mone", "--nested.same_flops", "--nested.capacity=0.3", "--training.steps=100")
    lengthen_to_same_flops(job)
    assert 200 < job.training.steps < 300
    assert not job.nested.same_flops


def test_one_class_is_no_task(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "cat" / "1.png")
    job = debug_job("mone", "--multimodal.source=folder", f"--multimodal.path={tmp_path}",
                    "--validation.no_enable")  # fmt: skip
    with pytest.raises(ValueError, match=r"has one class alone, .* name the folder above"):
        check_data(job)


@pytest.mark.parametrize("key", ["capacity", "delta", "beta", "num_routers"])
def test_zero_is_no_way_to_say_nothing(key):
    with pytest.raises(ValueError, match=rf"nested\.{key} = 0(\.0)?: must be .* \(-1: as the flav"):
        Nested(**{key: 0})
