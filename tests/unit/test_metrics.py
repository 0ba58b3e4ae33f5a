from __future__ import annotations

import math

import pytest
import torch
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.gang import run_ranks
from tests.jobs import debug_job
from torchtitan_mixtures.loss_report import bucket_scalars, describe_losses, describe_shares
from torchtitan_mixtures.metrics import build_metrics_processor, reduce_meter
from torchtitan_mixtures.objectives.meter import LossMeter


def test_scalars_are_nats_bits_and_shares():
    scalars = bucket_scalars("modality", {"text": (math.log(2), 30), "image": (2.0, 10)})
    assert scalars["modality/text/bits_per_token"] == pytest.approx(1.0)
    assert scalars["modality/image/loss"] == 2.0
    assert scalars["modality/text/token_share"] == 0.75
    text = describe_losses({"text": (math.log(2), 30), "image": (2.0, 10)})
    assert text == "text: 0.6931 (1.000 bits, 75%)  image: 2.0000 (2.885 bits, 25%)"


def test_buckets_without_bits_are_named_by_what_they_are():
    losses = {"0.25": (1.5, 30), "0.5": (2.0, 10)}
    assert (
        describe_losses(losses, "noise", in_bits=False) == "noise 0.25: 1.5000  noise 0.5: 2.0000"
    )
    assert describe_losses({"0.3": (2.5, 1)}, "capacity", in_bits=False) == "capacity 0.3: 2.5000"
    assert describe_shares({}) == ""
    found = describe_shares({"accuracy": 0.714, "top_5_accuracy": 1.0})
    assert found == "  accuracy: 71.40%  top_5_accuracy: 100.00%"


def parallel_dims(world):
    return ParallelDims(
        dp_replicate=1, dp_shard=world, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=world
    )


def reduce_on_rank():
    rank = torch.distributed.get_rank()
    dims = parallel_dims(2)
    dims.build_mesh()
    meter = LossMeter(["text", "image", "speech"])
    if rank == 0:  # the other rank added nothing
        meter.add(torch.tensor([6.0, 4.0, 0.0]), torch.tensor([3, 2, 0]))
    return reduce_meter(meter, dims)


def test_the_meter_is_summed_over_ranks_and_leaves_out_absent_modalities():
    expected = {"text": (2.0, 3), "image": (2.0, 2)}
    assert run_ranks(reduce_on_rank, 2) == [expected, expected]


def tower_norms(tmp_path):
    job = debug_job("mot", "--metrics.no_enable_tensorboard", f"--job.dump_folder={tmp_path}")
    args = get_train_spec("mot").model_args["debugmodel"]
    args.update_from_config(job)
    model = get_train_spec("mot").model_cls(args)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        tower = "text" if ".text." in name else "image" if ".image." in name else "shared"
        expected[tower] = expected.get(tower, 0.0) + float((parameter.grad.double() ** 2).sum())
    processor = build_metrics_processor(job, parallel_dims(1), args)
    processor.model_parts = [model]
    total = math.sqrt(sum(expected.values()))
    # As after clipping to norm 1: the processor is told the norm before.
    for parameter in model.parameters():
        parameter.grad /= total
    return processor._tower_norms(total), {k: math.sqrt(v) for k, v in expected.items()}


def test_gradient_norms_of_towers_are_those_before_clipping(tmp_path):
    ((found, expected),) = run_ranks(tower_norms, 1, str(tmp_path))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("flavor", "untie", "name", "tower"),
    [
        ("debugmodel", "", "layers.0.attention.wq.image.weight", "image"),
        ("debugmodel", "", "layers.0._orig_mod.ffn_norm.text.weight", "text"),
        ("debugmodel", "", "tok_embeddings.weight", None),
        ("debugmodel", "", "norm.weight", None),
        ("debugmodel", "ffn", "layers.0.attention.wq.text.weight", None),
        ("debugmodel", "ffn", "layers.0.feed_forward.w1.text.weight", "text"),
        ("debugmodel_dense", "", "layers.0.attention.wq.text.weight", None),
    ],
)
def test_parameters_are_attributed_to_towers(flavor, untie, name, tower):
    args = get_train_spec("mot").model_args[flavor]
    args.update_from_config(
        debug_job("mot", f"--mixture.untie={untie}" if untie else "--mixture.untie=")
    )
    assert args.tower_of_parameter(name) == tower


def test_untying_and_tower_maps_of_the_toml_reach_the_model():
    args = get_train_spec("mot").model_args["debugmodel_3modality"]
    args.update_from_config(
        debug_job(
            "mot", "--model.flavor=debugmodel_3modality", "--mixture.untie=attention+ffn",
            "--mixture.tower_of_modality", "0", "0", "1",
        )
    )  # fmt: skip
    assert (args.untie_attention, args.untie_ffn, args.untie_norm) == (True, True, False)
    assert args.tower_names == ["text", "speech"]
