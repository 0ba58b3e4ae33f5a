from __future__ import annotations

import pytest

from torchtitan_mixtures.planning.candidates import Candidate, Layout, Space, divisors

PIPELINES = ((1, ""), (2, "Interleaved1F1B"), (2, "1F1B"))


def space(world_size, **changes):
    values = {
        "of_a_node": 8,
        "samples": 64,
        "least_rows": 1,
        "tensor": (1, 2, 4, 8),
        "context": (1,),
        "pipeline": PIPELINES,
    }
    return Space(world_size=world_size, **(values | changes))


def ranks(layout):
    return layout.replicas * layout.shards * layout.tensor * layout.context * layout.pipeline


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 12, 16, 64])
def test_layouts_use_all_ranks_once_and_always_cut_parameters(world_size):
    layouts = list(space(world_size, context=(1, 2)).layouts())
    assert layouts and len(layouts) == len(set(layouts))
    for layout in layouts:
        assert ranks(layout) == world_size
        assert layout.context * layout.shards > 1 or world_size == 1
        assert (layout.schedule == "") == (layout.pipeline == 1)


def test_replicas_have_a_node_each_or_more():
    plain = [each for each in space(32).layouts() if each.tensor == each.pipeline == 1]
    assert [(each.replicas, each.shards) for each in plain] == [(1, 32), (2, 16), (4, 8)]
    cut = [each for each in space(32).layouts() if each.tensor == 4 and each.pipeline == 1]
    assert [(each.replicas, each.shards) for each in cut] == [(1, 8), (2, 4), (4, 2)]


def test_one_node_has_no_replicas():
    assert all(layout.replicas == 1 for layout in space(8).layouts())


def test_candidates_keep_the_samples_of_a_step():
    found = list(space(8, samples=48).candidates())
    assert {each.mode for each in found} == {"none", "selective", "full"}
    for each in found:
        assert each.rows * each.rounds * each.layout.readers == 48
        assert each.rows & (each.rows - 1) == 0
        assert each.rows >= each.layout.pipeline
    rows = {each.rows for each in found if each.layout == Layout(shards=8)}
    assert rows == {1, 2}  # six samples a rank: four do not divide them


def test_fewer_samples_than_readers_are_no_candidate():
    found = list(space(8, samples=4, pipeline=((1, ""),)).candidates())
    assert {each.layout.tensor for each in found} == {2, 4}


def test_the_smallest_batch_of_a_job_is_kept_to():
    found = space(8, samples=64, least_rows=4).candidates()
    assert {each.rows for each in found if each.layout == Layout(shards=8)} == {4, 8}


def test_a_candidate_says_all_that_it_decides_on_the_command_line():
    layout = Layout(2, 1, 2, "Interleaved1F1B", 2, 4)
    assert Candidate(layout, "selective", 8, 128).overrides() == (
        "--parallelism.data_parallel_replicate_degree=2",
        "--parallelism.data_parallel_shard_degree=4",
        "--parallelism.tensor_parallel_degree=2",
        "--parallelism.context_parallel_degree=1",
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
        "--parallelism.pipeline_parallel_microbatch_size=1",
        "--training.local_batch_size=8",
        "--training.global_batch_size=128",
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op",
    )
    plain = Candidate(Layout(shards=2), "none", 1, -1)
    assert not any("schedule" in text or "selective" in text for text in plain.overrides())
    assert plain.rounds == 1


def test_divisors_are_all_of_them_in_order():
    for number in range(1, 50):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
