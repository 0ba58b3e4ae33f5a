"""The trainer on two ranks: every data-parallel layout takes the same steps."""

from __future__ import annotations

import pytest

from tests.gang import run_ranks
from tests.runs import QUICK, train
from torchtitan_mixtures.models import FAMILIES

pytestmark = pytest.mark.distributed

TWO_RANKS = {
    "FSDP2": [],
    "DDP": ["--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=1"],
    "FSDP2_compiled": ["--compile.enable", "--compile.backend=aot_eager"],
    "FSDP2_full_ac": ["--activation_checkpoint.mode=full"],
    "FSDP2_never_reshard": ["--parallelism.fsdp_reshard_after_forward=never"],
    "FSDP2_cpu_offload": ["--training.enable_cpu_offload"],
}  # fmt: skip


# Four microbatches of one sequence on each rank are to equal one of four.
BASE = (*QUICK, "--training.steps=3", "--training.global_batch_size=8",
        "--lr_scheduler.warmup_steps=1")  # fmt: skip


def run(family, folder, local, *options):
    records = run_ranks(
        train, 2, family, *BASE, f"--training.local_batch_size={local}", *options,
        f"--job.dump_folder={folder}", init=False, timeout=200,
    )  # fmt: skip
    assert records[0]["loss"] == records[1]["loss"]
    assert records[0]["weights"] == records[1]["weights"]
    return records[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    # Two ranks read other documents than one, so runs of two ranks are compared.
    return {f: run(f, tmp_path_factory.mktemp(f), 4) for f in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_every_layout_takes_the_same_steps_with_accumulation(family, layout, expected, tmp_path):
    found = run(family, tmp_path, 1, *TWO_RANKS[layout])
    for step, loss in expected[family]["loss"].items():
        assert found["loss"][step] == pytest.approx(loss, rel=2e-5)
        grad_norm = expected[family]["grad_norm"][step]
        assert found["grad_norm"][step] == pytest.approx(grad_norm, rel=2e-3)
