from __future__ import annotations

import dataclasses
import json

import pytest
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import debug_job
from torchtitan_mixtures import checkpoint_config


def make_checkpoint(tmp_path, step=3, *overrides):
    """A folder that looks complete to TorchTitan: only names are read here."""
    job = debug_job("mot", f"--job.dump_folder={tmp_path}", *overrides)
    args = get_train_spec("mot").model_args[job.model.flavor]
    args.update_from_config(job)
    folder = tmp_path / "checkpoint" / f"step-{step}"
    checkpoint_config.write(folder, job, args)
    (folder / ".metadata").touch()
    return folder, job, args


def check(tmp_path, *overrides):
    job = debug_job("mot", f"--job.dump_folder={tmp_path}", *overrides)
    args = get_train_spec("mot").model_args[job.model.flavor]
    args.update_from_config(job)
    checkpoint_config.check_resume(job, args)


def test_it_says_what_the_checkpoint_is_of(tmp_path):
    folder, _, args = make_checkpoint(tmp_path)
    content = checkpoint_config.read(folder)
    assert (content["family"], content["flavor"]) == ("mot", "debugmodel")
    assert content["vocab_ranges"] == {"text": [0, 2048], "image": [2048, 3072]}
    assert content["parameters"]["tok_embeddings.weight"] == [3072, 256]
    assert content["model_args"]["dim"] == args.dim
    assert content["job_config"]["training"]["seq_len"] == 256


def test_the_same_flavour_may_resume_and_another_is_named(tmp_path):
    make_checkpoint(tmp_path)
    check(tmp_path)
    with pytest.raises(ValueError, match=r"is a checkpoint of mot/debugmodel, this job is mot/debu"
                                         r"gmodel_3modality: .* Set model\.flavor"):  # fmt: skip
        check(tmp_path, "--model.flavor=debugmodel_3modality")
    with pytest.raises(ValueError, match=r"step-3.*mot/debugmodel_dense"):
        check(tmp_path, "--model.flavor=debugmodel_dense")


def test_a_flavour_that_computes_the_same_may_resume(tmp_path):
    make_checkpoint(tmp_path, 3, "--model.flavor=debugmodel_varlen_attn")
    check(tmp_path, "--model.flavor=debugmodel_flex_attn", "--mixture.dispatch=grouped")


@pytest.mark.parametrize(
    ("flavor", "field"),
    [("debugmodel_post_norm", "norm_position"), ("debugmodel_flex_attn", "attn_mask_type")],
)
def test_the_same_parameters_in_another_model_are_refused(tmp_path, flavor, field):
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=rf"is a checkpoint of mot/debugmodel.*{field} was"):
        check(tmp_path, f"--model.flavor={flavor}")


def check_with_ranks(tmp_path, monkeypatch, ranks, *overrides):
    """Resume with so many processes; return the number of shards that the job then has."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    job = debug_job("mot", f"--job.dump_folder={tmp_path}", *overrides)
    args = get_train_spec("mot").model_args[job.model.flavor]
    args.update_from_config(job)
    checkpoint_config.check_resume(job, args)
    return job.multimodal.shards


def test_automatic_shards_are_those_of_the_checkpoint(tmp_path, monkeypatch):
    folder, _, _ = make_checkpoint(tmp_path, 3, "--multimodal.shards=12")
    assert checkpoint_config.read(folder)["data_shards"] == 12
    for ranks in (1, 2, 3, 4, 6, 12):
        assert check_with_ranks(tmp_path, monkeypatch, ranks) == 12
    assert check_with_ranks(tmp_path, monkeypatch, 2, "--training.dataloader.num_workers=6") == 12
    assert check_with_ranks(tmp_path, monkeypatch, 1, "--multimodal.shards=12") == 12


def test_a_new_run_has_shards_for_many_numbers_of_ranks(tmp_path, monkeypatch):
    folder, job, args = make_checkpoint(tmp_path)
    assert checkpoint_config.read(folder)["data_shards"] == 48
    assert check_with_ranks(tmp_path, monkeypatch, 16) == 48
    for ranks, shards in ((5, 240), (32, 96)):
        checkpoint_config.write(folder, job, args, ranks)
        assert checkpoint_config.read(folder)["data_shards"] == shards


def test_ranks_that_cannot_share_the_shards_are_refused(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"into 48 shards .*5 data-parallel ranks \(.*data_parallel_replicate_degree.*"
        r"num_workers = 0 .* 1, 2, 3, 4, 6, 8, 12, 16, 24, 48 of them.*multimodal\.shards to 0 or "
        r'a multiple of 5; .*exclude_from_loading = \["dataloader"\]',
    ):
        check_with_ranks(tmp_path, monkeypatch, 5)
    with pytest.raises(ValueError, match=r"2 data-parallel.*num_workers = 5.*lower num_workers"):
        check_with_ranks(tmp_path, monkeypatch, 2, "--training.dataloader.num_workers=5")
    excluded = "--checkpoint.exclude_from_loading=dataloader"
    assert check_with_ranks(tmp_path, monkeypatch, 5, excluded) == 0  # counted anew


def test_other_shards_than_the_checkpoints_are_refused(tmp_path):
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"multimodal\.shards is 24, but 48 in the run .*Put it"):
        check(tmp_path, "--multimodal.shards=24")


def test_data_of_an_earlier_version_is_refused(tmp_path):
    folder, _, _ = make_checkpoint(tmp_path)
    content = checkpoint_config.read(folder)
    del content["data_shards"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"step-3 was written by an earlier version.*exclude_from"):
        check(tmp_path)
    check(tmp_path, "--checkpoint.exclude_from_loading=dataloader")


def test_a_family_without_tokens_has_no_shards(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class OtherArgs:
        width: int = 8

    monkeypatch.setattr(checkpoint_config, "parameter_shapes", lambda *_: {"weight": [8]})
    job = debug_job("mot", f"--job.dump_folder={tmp_path}")
    folder = tmp_path / "checkpoint" / "step-1"
    checkpoint_config.write(folder, job, OtherArgs(), 5)
    (folder / ".metadata").touch()
    assert checkpoint_config.read(folder)["data_shards"] is None
    checkpoint_config.check_resume(job, OtherArgs())
    assert job.multimodal.shards == 0


def test_a_new_run_needs_no_checkpoint_and_an_asked_for_one_must_exist(tmp_path):
    check(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"step-7 does not exist"):
            check(tmp_path, "--checkpoint.load_step=7")
        make_checkpoint(tmp_path)


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    whole, *_ = make_checkpoint(tmp_path, 3)
    left, *_ = make_checkpoint(tmp_path, 6)
    (left / ".metadata").unlink()
    foreign = whole.with_name("step-9")
    foreign.mkdir()
    checkpoint_config.remove_incomplete(whole.parent)
    assert {path.name for path in whole.parent.iterdir()} == {"step-3", "step-9"}


def test_a_run_killed_in_its_first_save_starts_from_the_initial_checkpoint_again(tmp_path):
    initial, *_ = make_checkpoint(tmp_path / "initial", 3)
    left, *_ = make_checkpoint(tmp_path / "run", 1, "--model.flavor=debugmodel_dense")
    (left / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"initial/checkpoint/step-3 is a checkpoint of mot/debug"):
        check(
            tmp_path / "run", f"--checkpoint.initial_load_path={initial}",
            "--model.flavor=debugmodel_dense",
        )  # fmt: skip
    checkpoint_config.remove_incomplete(left.parent)
    assert not left.parent.exists()


def test_a_checkpoint_that_is_written_over_does_not_count_until_it_is_whole(tmp_path):
    make_checkpoint(tmp_path, 3)
    folder, job, args = make_checkpoint(tmp_path, 6)
    assert checkpoint_config.latest_checkpoint(folder.parent) == folder
    checkpoint_config.write(folder, job, args)
    assert checkpoint_config.latest_checkpoint(folder.parent) == folder.with_name("step-3")


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    make_checkpoint(tmp_path, 3)
    folder, _, _ = make_checkpoint(tmp_path, 4)
    (folder / ".metadata").unlink()
    assert checkpoint_config.latest_checkpoint(tmp_path / "checkpoint").name == "step-3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json is missing.*exchange safetensors"),
        ("{", r"config\.json is not valid JSON"),
        (json.dumps({"format": 99}), r"not of format 1"),
        (json.dumps([]), r"not of format 1"),
    ],
)
def test_a_folder_that_is_not_ours_is_refused(tmp_path, content, message):
    folder, _, _ = make_checkpoint(tmp_path)
    path = folder / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        check(tmp_path)


# --- models of images -----------------------------------------------------------------------------


def images_job(run, *overrides):
    job = debug_job("mom", "--ema.decay=0", f"--job.dump_folder={run}", *overrides)
    args = get_train_spec("mom").model_args[job.model.flavor]
    args.update_from_config(job)
    return job, args


def make_images_checkpoint(run, *overrides, **options):
    job, args = images_job(run, *overrides)
    folder = run / "checkpoint" / "step-3"
    checkpoint_config.write(folder, job, args, **options)
    (folder / ".metadata").touch()
    return folder


def check_images(run, *overrides):
    checkpoint_config.check_resume(*images_job(run, *overrides))


FIXED = "--objective.no_learned_variance"
FLOW = "--objective.kind=flow"


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (FIXED, FLOW, r"objective\.kind = 'flow': it was 'ddpm' in .*step-3.*initial_load_path = "),
        ("", FLOW, r"objective\.kind = 'flow': .* as it was, or another job\.dump_folder\.$"),
        (FLOW, FIXED, r"objective\.kind = 'ddpm': it was 'flow'"),
        ("", FIXED, r"objective\.learned_variance = False: it was True"),
        ("", "--objective.noise_steps=500", r"objective\.noise_steps = 500: it was 1000"),
        ("--objective.noise_schedule=squared_cosine", "", r"noise_schedule = 'linear': it was 'sq"),
    ],
)
def test_a_run_does_not_go_on_as_another_process(tmp_path, before, now, message):
    make_images_checkpoint(tmp_path, *filter(None, [before]))
    check_images(tmp_path, *filter(None, [before]))
    with pytest.raises(ValueError, match=message):
        check_images(tmp_path, *filter(None, [now]))


def test_a_run_does_not_go_on_with_another_vae(tmp_path):
    folder = make_images_checkpoint(tmp_path)
    content = checkpoint_config.read(folder)
    content["job_config"]["multimodal"]["vae"] = "vae-of-then"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"multimodal\.vae = '': it was 'vae-of-then' in .*step-3"):
        check_images(tmp_path)


def test_what_does_not_change_the_process_may_differ(tmp_path):
    make_images_checkpoint(tmp_path, FLOW)
    check_images(
        tmp_path, FLOW, "--objective.time_density=logit_normal", "--objective.time_shift=3",
        "--objective.class_dropout=0.2", "--objective.balance_weight=0", "--objective.z_weight=1",
        "--objective.noise_steps=10",
    )  # fmt: skip


def test_weights_alone_may_begin_another_process_with_a_warning(tmp_path, caplog):
    load = f"--checkpoint.initial_load_path={make_images_checkpoint(tmp_path / 'old', FIXED)}"
    check_images(tmp_path / "new", load, FIXED)
    check_images(tmp_path / "new", load, FIXED, "--objective.noise_steps=10")
    check_images(tmp_path / "new", load, FLOW)
    messages = [record.message for record in caplog.records]
    first, second = (message for message in messages if message.startswith("The weights of"))
    assert "trained with other settings: objective.noise_steps = 10 (was 1000)." in first
    assert "objective.kind = 'flow' (was 'ddpm')." in second
    with pytest.raises(ValueError, match=r"kind = 'flow'.*initial_load_model_only = true\.$"):
        check_images(tmp_path / "new", load, FLOW, "--checkpoint.no_initial_load_model_only")
    with pytest.raises(
        ValueError, match=r"final_layer.*Set model\.flavor and \[objective\] \(kind, learned_varia"
    ):
        check_images(tmp_path / "new", load)


@pytest.mark.parametrize("flavor", ["debugmodel", "debugmodel_dit"])
def test_images_of_another_size_are_answered_with_how_to_resize(tmp_path, flavor):
    options = (f"--model.flavor={flavor}", "--multimodal.image_size=64")
    folder = make_images_checkpoint(tmp_path / "old", options[0])
    resize = rf"multimodal\.image_size = 32, not 64: .*convert\.py resize --checkpoint {folder} "
    with pytest.raises(ValueError, match=f"{resize}.*, with another job.dump_folder"):
        check_images(tmp_path / "old", *options)
    with pytest.raises(ValueError, match=rf"{resize}.* \(checkpoint\.initial_load_path\)\.$"):
        check_images(tmp_path / "new", *options, f"--checkpoint.initial_load_path={folder}")
    with pytest.raises(
        ValueError, match=r"top_k was 2 .*Set model\.flavor and \[mixture\] as they"
    ):
        make_images_checkpoint(tmp_path / "old")
        check_images(tmp_path / "old", "--mixture.top_k=3")


def test_an_mmdit_begins_with_weights_of_smaller_images(tmp_path):
    def job_and_args(run, *overrides):
        job = debug_job("mmdit", f"--job.dump_folder={run}", *overrides)
        args = get_train_spec("mmdit").model_args[job.model.flavor]
        args.update_from_config(job)
        return job, args

    folder = tmp_path / "old" / "checkpoint" / "step-3"
    checkpoint_config.write(folder, *job_and_args(tmp_path / "old", "--multimodal.image_size=16"))
    (folder / ".metadata").touch()
    load = f"--checkpoint.initial_load_path={folder}"
    checkpoint_config.check_resume(*job_and_args(tmp_path / "new", load))
    with pytest.raises(ValueError, match=r"prompt_length|positions"):  # but not of other prompts
        other = job_and_args(tmp_path / "new", load, "--multimodal.prompt_length=20")
        checkpoint_config.check_resume(*other)


# --- weights only ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_run_does_not_go_on_from_weights_alone(tmp_path, decay):
    ema = f"--ema.decay={decay}"
    folder = make_images_checkpoint(tmp_path / "old", ema, weights_only=True)
    assert checkpoint_config.read(folder)["weights_only"]
    with pytest.raises(
        ValueError, match=r"step-3 has nothing but weights, as .*checkpoint\.load_s"
    ):
        check_images(tmp_path / "old", ema)
    load = f"--checkpoint.initial_load_path={folder}"
    check_images(tmp_path / "new", load, ema)
    afresh = "--checkpoint.exclude_from_loading=optimizer,lr_scheduler,dataloader,train_state"
    check_images(tmp_path / "old", f"{afresh},ema", ema)
    message = r"initial_load_model_only = false: .* has nothing but weights; set it to true"
    with pytest.raises(ValueError, match=message):
        check_images(tmp_path / "new", load, ema, "--checkpoint.no_initial_load_model_only")
    if decay:
        with pytest.raises(ValueError, match="has nothing but weights"):
            check_images(tmp_path / "old", afresh, ema)


def test_tokens_do_not_go_on_from_weights_alone_either(tmp_path):
    folder, job, args = make_checkpoint(tmp_path)
    assert not checkpoint_config.read(folder)["weights_only"]
    checkpoint_config.write(folder, job, args, weights_only=True)
    (folder / ".metadata").touch()
    with pytest.raises(ValueError, match="has nothing but weights"):
        check(tmp_path)
