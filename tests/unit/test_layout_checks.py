"""Impossible layouts are refused at start-up, with the key to change and what is possible."""

from __future__ import annotations

import pytest

from tests.jobs import debug_job
from torchtitan_mixtures import device, layout_checks
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.layout_checks import check_tensor_parallel
from torchtitan_mixtures.models.mot import mot_args

TP = "--parallelism.tensor_parallel_degree"
CP = "--parallelism.context_parallel_degree"
PP = "--parallelism.pipeline_parallel_degree"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
BATCH = "--training.local_batch_size"
REPLICATE = "--parallelism.data_parallel_replicate_degree"
SHARD = "--parallelism.data_parallel_shard_degree"

IMPOSSIBLE = [
    (3, [f"{TP}=3"], r"tensor_parallel_degree = 3: .*'debugmodel' has 16 heads and 16 key.* "
                     r"Possible here: 1, 2, 4, 8, 16\."),
    (6, [f"{TP}=4"], r"tensor_parallel_degree = 4: must divide the number of processes, 6: 1, 2, "
                     r"3, 6\."),
    (1, [f"{TP}=0"], r"tensor_parallel_degree = 0: must be 1 or more"),
    (32, [f"{TP}=32"], r"tensor_parallel_degree = 32: .*has 16 heads"),
    (16, [f"{TP}=16", "--model.flavor=8B_2modality"],
     r"has 8 key and value heads, which .* Possible here: 1, 2, 4, 8\."),
    (2, [f"{TP}=2", "--model.flavor=debugmodel_dense", "--training.seq_len=257"],
     r"has 257 positions \(training\.seq_len\), which it does not divide"),
    (4, [f"{TP}=2", f"{CP}=2", "--model.flavor=debugmodel_dense", "--training.seq_len=258"],
     r"has 129 positions \(training\.seq_len, in 2 parts\), which it does not divide"),
    (2, [f"{TP}=2", "--mixture.dispatch=reference"], r'mixture\.dispatch = "reference": goes'),
    (2, [f"{TP}=2", "--parallelism.enable_async_tensor_parallel"],
     r"enable_async_tensor_parallel = true: needs compile\.enable = true"),
    (4, [f"{TP}=2", f"{REPLICATE}=2"],
     r"replicate_degree = 2 and .*tensor_parallel_degree = 2: DDP goes with no other .*"
     r"data_parallel_shard_degree = 2"),
    (4, [f"{PP}=2", f"{REPLICATE}=2"], r"pipeline_parallel_degree = 2: DDP goes with no other"),
    (4, [f"{TP}=2", f"{SHARD}=4"],
     r"processes, 4, divided by parallelism\.tensor_parallel_degree \(2\) = 2"),
    (8, [f"{TP}=2", f"{PP}=2", f"{SHARD}=4"],
     r"divided by parallelism\.tensor_parallel_degree \(2\) x parallelism\.pipeline_parallel_degree"
     r" \(2\) = 2"),
    (4, [f"{TP}=2", "--training.global_batch_size=6"], r"data-parallel ranks \(2\) = 4"),
    (6, [f"{TP}=2", f"{CP}=2"], r"tensor_parallel_degree = 2 x parallelism\.context_parallel_degree"
                                r" = 2, together 4: their product must divide .* 6: 1, 2, 3, 6\."),
    (3, [f"{CP}=3"], r"context_parallel_degree = 3: .* has 16 heads and 256 positions \(training\."
                     r"seq_len\).* Possible here: 1, 2, 4, 8, 16\."),
    (16, [f"{TP}=4", f"{CP}=8"],
     r"context_parallel_degree = 8: .*has 4 heads on each of 4 ranks of tensor parallelism.* "
     r"Possible here: 1, 2, 4\."),
    (2, [f"{CP}=2", "--validation.seq_len=255"], r"255 positions \(validation\.seq_len\)"),
    (1, [f"{CP}=0"], r"context_parallel_degree = 0: must be 1 or more"),
    (2, [f"{CP}=2", "--mixture.context_parallel=ring"],
     r'mixture\.context_parallel = "ring": .*accelerators only.*set "all_to_all"'),
    (2, [f"{PP}=2", f"{BATCH}=1"], r"pipeline_parallel_degree = 2, .*'1F1B': cannot run 1 "
                                   r"microbatches .* Possible: 2, 3, 4, 5, 6, 7, 8"),
    (2, [f"{PP}=2", f"{SCHEDULE}=1G1B"], r"'1G1B': must be one of 1F1B, Interleaved1F1B, GPipe"),
    (2, [f"{PP}=2", f"{SCHEDULE}=Interleaved1F1B", f"{BATCH}=5"],
     r"'Interleaved1F1B': cannot run 5 microbatches .* Possible: 1, 2, 3, 4, 6, 8"),
    (2, [f"{PP}=2", f"{SCHEDULE}=ZBVZeroBubble", "--compile.enable",
         "--compile.backend=aot_eager"], r"'ZBVZeroBubble': splits backward .*compile\.enable = f"),
    (2, [f"{PP}=2", f"{SCHEDULE}=DualPipeV", f"{BATCH}=3"], r"'DualPipeV': cannot run 3 microb"),
    (2, [f"{PP}=2", "--parallelism.pipeline_parallel_layers_per_stage=2"],
     r"'1F1B': takes exactly 1 stages on a rank, the layout makes 2\. Remove "
     r"parallelism\.pipeline_parallel_layers_per_stage"),
    (2, [f"{PP}=2", f"{SCHEDULE}=Interleaved1F1B",
         "--parallelism.pipeline_parallel_layers_per_stage=4"], r"takes at least 2 stages .* 1\."),
    (2, [f"{PP}=2", "--parallelism.pipeline_parallel_layers_per_stage=3"],
     r"cannot be dealt out to its stages\. Degrees that these settings allow: 1, 3"),
    (16, [f"{PP}=16", f"{BATCH}=16"],
     r"pipeline_parallel_degree = 16, .*: 6 layers, the embedding .* Degrees .*: 1, 2, 3, 4, 5, 6,"
     r" 7, 8\."),
    (2, [f"{PP}=2", "--parallelism.pipeline_parallel_microbatch_size=3", f"{BATCH}=4"],
     r"pipeline_parallel_microbatch_size = 3: must divide training\.local_batch_size = 4: 1, 2, 4"),
    (2, [f"{PP}=2", "--parallelism.pipeline_parallel_microbatch_size=0"], r"microbatch_size = 0"),
    (2, [f"{PP}=2", "--parallelism.pipeline_parallel_layers_per_stage=0"],
     r"layers_per_stage = 0: must be 1 or more"),
    (2, [f"{PP}=2", "--parallelism.pipeline_parallel_first_stage_less_layers=-3"],
     r"first_stage_less_layers = -3: must be 0 or more"),
    (2, [f"{PP}=2", "--parallelism.pipeline_parallel_schedule_csv=/nope.csv"],
     r"schedule_csv = '/nope.csv': no such file"),
    (2, [f"{CP}=2", "--parallelism.context_parallel_load_balancer=foo"],
     r"context_parallel_load_balancer = 'foo': must be 'headtail' or 'ptrr'"),
]  # fmt: skip


@pytest.mark.parametrize(("world", "overrides", "message"), IMPOSSIBLE)
def test_an_impossible_layout_is_refused(world, overrides, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=message):
        check_job(debug_job("mot", f"--job.dump_folder={tmp_path}", *overrides))


ALL = ["tok_embeddings", *(f"layers.{i}" for i in range(6)), "norm", "output"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([ALL[:4], ALL[4:]], None),
        ([], r"has 0 parts; .* a multiple of parallelism\.pipeline_parallel_degree = 2"),
        ([ALL[:3], ALL[3:5], ALL[5:]], r"has 3 parts"),
        (
            [ALL[:4], [n for n in ALL[4:] if n != "layers.5"]],
            r"norm stands where layers\.5 belongs",
        ),
        ([ALL[:5], ALL[4:]], r"layers\.3 stands where layers\.4 belongs"),
        ([["tok_embedding", *ALL[1:4]], ALL[4:]], r"tok_embedding stands where tok_embeddings"),
        ([ALL[:4], ALL[4:-1]], r"nothing stands where output belongs"),
        ([ALL[:4], [*ALL[4:], "layers.6"]], r"layers\.6 stands where nothing belongs"),
    ],
)
def test_stages_listed_by_hand_are_the_whole_model(parts, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = debug_job("mot", f"--job.dump_folder={tmp_path}", f"{PP}=2")
    job.parallelism.module_fqns_per_model_part = parts
    if message is None:
        check_job(job)
    else:
        with pytest.raises(ValueError, match=r"module_fqns_per_model_part: " + message):
            check_job(job)


POSSIBLE = [
    (2, [f"{TP}=2"]), (4, [f"{TP}=2"]), (4, [f"{TP}=2", f"{SHARD}=2"]),
    (8, [f"{TP}=2", f"{REPLICATE}=2"]),
    (2, [f"{TP}=2", "--mixture.dispatch=grouped", "--training.global_batch_size=4"]),
    (4, [f"{CP}=4"]), (4, [f"{CP}=2", f"{REPLICATE}=2"]), (8, [f"{TP}=2", f"{CP}=2"]),
    (2, [f"{PP}=2"]), (8, [f"{PP}=8", f"{BATCH}=8"]),
    (2, [f"{PP}=2", f"{SCHEDULE}=InterleavedZeroBubble", f"{BATCH}=4"]),
    (2, [f"{PP}=2", f"{SCHEDULE}=zbvzerobubble"]),
    (8, [f"{PP}=2", f"{TP}=2", f"{CP}=2"]),
]  # fmt: skip


@pytest.mark.parametrize(("world", "overrides"), POSSIBLE)
def test_a_possible_layout_is_let_through(world, overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    check_job(debug_job("mot", f"--job.dump_folder={tmp_path}", *overrides))


def test_a_family_is_refused_what_it_does_not_declare(tmp_path, monkeypatch):
    job = debug_job("mot", f"--job.dump_folder={tmp_path}", f"{TP}=2", f"{CP}=2", f"{PP}=2")
    args = mot_args["debugmodel"]
    with pytest.raises(ValueError, match=r"tensor_\w+ = 2: mot does not support it; set it to 1"):
        check_tensor_parallel(job, args, None)
    with pytest.raises(ValueError, match=r"context_\w+ = 2: mot does not support it; set it to 1"):
        layout_checks._check_context_parallel(job, args, None)

    class WithoutPipeline:
        pipelining_fn = None

    monkeypatch.setattr(layout_checks, "get_train_spec", lambda name: WithoutPipeline)
    with pytest.raises(ValueError, match=r"pipeline_\w+ = 2: mot does not support it; set it to"):
        layout_checks._check_pipeline(job, args)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], None),
        (["--training.seq_len=258"], r"129 positions \(training\.seq_len\)"),
        (["--model.flavor=debugmodel_varlen_attn"], r'attends with "sdpa" or "flex", not \'varlen'),
        (["--parallelism.context_parallel_load_balancer=ptrr"], r"load_balancer = 'ptrr': must be"),
        (["--model.flavor=debugmodel_flex_attn",
          "--parallelism.context_parallel_load_balancer=ptrr"], None),
    ],
)  # fmt: skip
def test_the_ring_where_there_is_an_accelerator(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(device, "has_accelerator", lambda: True)
    job = debug_job(
        "mot", f"--job.dump_folder={tmp_path}", f"{CP}=2", "--mixture.context_parallel=ring",
        *overrides,
    )  # fmt: skip
    if message is None:
        check_job(job)
    else:
        with pytest.raises(ValueError, match=message):
            check_job(job)
