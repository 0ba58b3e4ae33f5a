"""Bad input gets one clear message that names key, value and remedy, before any work."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from traceback import StackSummary

import pytest
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import ROOT, TRAIN_CONFIGS, debug_job
from tests.rows import quick
from torchtitan_mixtures import checks, device
from torchtitan_mixtures.checks import (
    check_arguments,
    check_job,
    require_checked,
    warn_of_unaligned_widths,
)
from torchtitan_mixtures.job_config import Mixture, Multimodal
from torchtitan_mixtures.user_errors import one_message, user_error

CODEBOOK = ROOT / "torchtitan_mixtures/data/corpora/emoji/codebook_speech.safetensors"
DEBUG = (TRAIN_CONFIGS / "mot" / "debugmodel.toml").read_text()


def write(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return ["--job.config_file", str(path)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 3e-3", 'lr = "high"', r"optimizer\.lr = 'high': must be a number"),
        ("lr = 3e-3", "betas = [0.9, 0.95]", r"optimizer\.betas: unknown key; did you mean .*beta"),
        ("[optimizer]", "[optimiser]", r"optimiser: unknown section; did you mean optimizer"),
        ("seq_len = 2048", "seq_len = 2048.5", r"training\.seq_len = 2048\.5: must be an integer"),
        ('source = "emoji"', 'source = "emojis"', r"multimodal\.source = 'emojis': must be one of"),
        ("scene_fraction = 0.25", "scene_fractoin = 1", r"did you mean multimodal\.scene_fraction"),
        ("enable = true", "enable = 1", r"enable = 1: must be true or false"),
        ("[job]", "[job", r"not valid TOML"),
        ('"torchtitan_mixtures.job_config"', '""', r"custom_config_module = ''"),
    ],
)
def test_a_wrong_toml_is_refused(tmp_path, old, new, message):
    assert old in DEBUG
    with pytest.raises(ValueError, match=message):
        check_arguments(write(tmp_path, DEBUG.replace(old, new, 1)))


def test_a_missing_toml_and_no_toml_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.toml: cannot be read \(No such file"):
        check_arguments(["--job.config_file=nowhere.toml"])
    with pytest.raises(ValueError, match=r"pass --config FILE\.toml"):
        check_arguments(["--training.steps=3"])
    for arguments in (["--job.config_file"], ["--job.config_file", "--training.steps=3"]):
        with pytest.raises(ValueError, match="the name of a TOML file must follow"):
            check_arguments(arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.flavor=8B"], r"model\.flavor = '8B'.*debugmodel.*70B_3modality"),
        (["--model.name=llama3"], r"model\.name = 'llama3': this plugin has mot"),
        (["--multimodal.source=datasets"], r'multimodal\.path = ""'),
        (["--multimodal.image_tokenizer=vq"], r"emoji_32px.*emoji_64px"),
        (["--multimodal.text_weight=0", "--multimodal.image_weight=0"], r"nothing would be"),
        (["--multimodal.validation_splits=val"], r"validation_splits = 'val': .*unseen_concept"),
        (
            ["--multimodal.validation_splits=unseen_voice"],
            r"'unseen_voice': .* has text, image\. Leave the split out, or choose a model\.flavor",
        ),
        (
            ["--model.flavor=debugmodel_3modality", "--multimodal.speech_tokenizer=vq"],
            r"speech_tokenizer = 'vq' is unknown; use emoji_25hz",
        ),
        (
            ["--model.flavor=debugmodel_3modality", f"--multimodal.speech_tokenizer={CODEBOOK}"],
            r"speech_tokenizer = .*holds units of \"emoji_25hz\" and no sound",
        ),
        (
            ["--model.flavor=debugmodel_3modality", "--validation.seq_len=80"],
            r"validation\.seq_len = 80 is too short: the longest spoken name .* to 8\d or more",
        ),
        (
            [
                "--model.flavor=debugmodel_3modality",
                *(f"--multimodal.{name}_weight=0" for name in ("text", "image", "speech")),
            ],
            r"image_weight = 0 and multimodal\.speech_weight = 0: nothing would be",
        ),
        (["--multimodal.train_split=all"], r"multimodal\.train_split = 'all': .*are train, unseen"),
        (
            ["--training.seq_len=60"],
            r"training\.seq_len = 60 is too short: an image takes 64",
        ),
        (["--validation.seq_len=60"], r"validation\.seq_len = 60 is too short"),
        (["--multimodal.text_tokenizer=nope"], r"multimodal\.text_tokenizer = 'nope' is unknown"),
        (["--training.local_batch_size=0"], r"training\.local_batch_size = 0: must be 1 or more"),
        (["--training.steps=0"], r"training\.steps = 0: must be 1 or more"),
        (["--metrics.log_freq=0"], r"metrics\.log_freq = 0: must be 1 or more"),
        (["--validation.freq=0"], r"validation\.freq = 0: must be 1 or more"),
        (["--validation.local_batch_size=0"], r"validation\.local_batch_size = 0: must be 1"),
        (
            ["--parallelism.data_parallel_replicate_degree=0"],
            r"data_parallel_replicate_degree = 0: must be 1 or more",
        ),
        (["--optimizer.name=SGDX"], r"optimizer\.name = 'SGDX': must be one of 'Adam', 'AdamW'"),
        (
            ["--checkpoint.keep_latest_k=1"],
            r"checkpoint\.keep_latest_k = 1: must be 0 \(all\) or 2",
        ),
        (["--checkpoint.load_step=7"], r"step-7 does not exist"),
        (["--training.global_batch_size=3"], r"global_batch_size = 3: must be -1 or a multiple"),
        (["--parallelism.data_parallel_shard_degree=2"], r"number\s+of processes, 1"),
        (["--parallelism.expert_parallel_degree=2"], r"expert_parallel_degree = 2"),
    ],
)
def test_a_job_that_cannot_work_is_refused(overrides, message, tmp_path):
    with pytest.raises((ValueError, KeyError), match=message):
        check_job(debug_job("mot", f"--job.dump_folder={tmp_path}", *overrides))


@pytest.mark.parametrize("family", ["mot", "mom"])
def test_an_average_that_the_last_checkpoint_would_lack_is_refused(family, tmp_path):
    options = (f"--job.dump_folder={tmp_path}", "--checkpoint.last_save_model_only")
    job = debug_job(family, *options, "--ema.decay=0.5")
    message = r"last_save_model_only = true: .* ema\.decay = 0\.5; set it to false"
    with pytest.raises(ValueError, match=message):
        check_job(job)
    check_job(debug_job(family, *options, "--ema.decay=0"))
    check_job(debug_job(family, *options, "--ema.decay=0.5", "--checkpoint.no_enable"))


@pytest.mark.parametrize(
    ("image_size", "options", "message"),
    [
        (32, [], ""),
        (12, ["--model.flavor=debugmodel_dit"], ""),
        (12, [], r"image_size = 12 has 9 tokens, not multiples of 4 as .* in float32"),
        (20, [], r"image_size = 20 has 25 tokens, not"),
        (24, [], ""),
        (24, ["--training.mixed_precision_param=bfloat16"], r"36 tokens, not multiples of 8 as"),
        (32, ["--parallelism.tensor_parallel_degree=256"], r"has 2 hidden units of a channel mix"),
    ],
)
def test_mixers_that_an_accelerator_computes_slowly_are_warned_of(
    image_size, options, message, monkeypatch, caplog
):
    job = debug_job("mom", *options)
    args = get_train_spec("mom").model_args[job.model.flavor]
    args.image_size = image_size
    monkeypatch.setattr(checks, "has_fast_grouped_mm", lambda dtype: True)
    caplog.clear()
    for has_accelerator in (False, True):
        monkeypatch.setattr(device, "has_accelerator", [has_accelerator].pop)
        warn_of_unaligned_widths(job, args)
        assert len(caplog.records) == (has_accelerator and message != "")
    assert not message or re.search(message, caplog.records[0].message)


@pytest.mark.parametrize(("flavor", "is_slow"), [("debugmodel", True), ("debugmodel_dit", False)])
def test_a_device_without_grouped_products_is_warned_of(flavor, is_slow, monkeypatch, caplog):
    monkeypatch.setattr(device, "has_accelerator", lambda: True)
    job = debug_job("mom")
    caplog.clear()
    warn_of_unaligned_widths(job, get_train_spec("mom").model_args[flavor])
    assert len(caplog.records) == is_slow
    assert not is_slow or "computed one by one" in caplog.records[0].message


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        (
            "mom",
            ["--objective.time_shift=3"],
            r"time_shift = 3\.0: is read with objective\.kind = ",
        ),
        ("mom", ["--objective.kind=flow", "--objective.noise_steps=500"], r"noise_steps = 500: is"),
        (
            "mom",
            ["--objective.kind=flow", "--objective.logit_std=2"],
            r"time_density = .logit",
        ),
        ("mom", ["--objective.noise_steps=4"], r"validation_levels = 8: there are no more than"),
        ("mom", ["--multimodal.image_weight=0.5"], r"image_weight = 0\.5: .* has no tokens of doc"),
        ("mone", ["--multimodal.max_pairs=2"], r"max_pairs = 2: .* has no tokens of documents"),
        ("mot", ["--debug.seed=-1"], r"debug\.seed = -1: must be 0 or more"),
        ("mom", ["--multimodal.seed=-1"], r"multimodal\.seed = -1: must be 0 or more"),
        ("mone", ["--optimizer.lr=-1"], r"optimizer\.lr = -1\.0: must be a finite number"),
        ("mom", ["--training.global_batch_size=3"], r"Possible local_batch_size: 1, 3\."),
    ],
)
def test_keys_that_would_change_nothing_or_cannot_be_are_refused(
    family, overrides, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        check_job(debug_job(family, f"--job.dump_folder={tmp_path}", *overrides))


def test_values_of_our_sections_are_checked_on_their_own():
    with pytest.raises(ValueError, match=r"multimodal\.scene_fraction = 2\.0: must be between"):
        Multimodal(scene_fraction=2.0)
    with pytest.raises(ValueError, match=r"multimodal\.image_weight = -1\.0: must be a finite"):
        Multimodal(image_weight=-1.0)
    with pytest.raises(ValueError, match=r"multimodal\.speech_weight = inf: must be a finite"):
        Multimodal(speech_weight=float("inf"))
    with pytest.raises(ValueError, match=r"multimodal\.seed = 'x': must be an integer"):
        Multimodal(seed="x")
    with pytest.raises(ValueError, match=r'mixture\.untie = "ffn\+heads": \'heads\' is not one of'):
        Mixture(untie="ffn+heads")


def test_a_model_with_speech_may_validate_on_the_unseen_voice(tmp_path):
    overrides = ("--model.flavor=debugmodel_3modality", "--multimodal.text_weight=0")
    splits = "--multimodal.validation_splits=unseen_voice"
    check_job(debug_job("mot", f"--job.dump_folder={tmp_path}", *overrides, splits))


def test_a_compiler_is_asked_for_before_compiling(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("torchtitan_mixtures.device.has_accelerator", lambda: False)
    job = debug_job("mot", "--compile.enable", f"--job.dump_folder={tmp_path}")
    with pytest.raises(ValueError, match=r"compile\.enable = true.*needs a C\+\+ compiler"):
        check_job(job)
    job = debug_job(
        "mot", "--compile.enable", "--compile.backend=aot_eager", f"--job.dump_folder={tmp_path}"
    )
    check_job(job)


def test_only_a_checked_job_may_use_what_needs_our_trainer(tmp_path):
    job = debug_job("mot", f"--job.dump_folder={tmp_path}")
    with pytest.raises(ValueError, match=r"launch with -m torchtitan_mixtures\.train"):
        require_checked(job, "this")
    check_job(job)
    require_checked(job, "this")


def test_the_command_prints_one_message_and_no_traceback():
    config = str(TRAIN_CONFIGS / "mot" / "debugmodel.toml")
    result = subprocess.run(
        [sys.executable, "-m", "torchtitan_mixtures.train", "--config", config,
         "--model.flavor", "9B"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 2
    assert "error: model.flavor = '9B'" in result.stderr
    assert "Traceback" not in result.stderr


DAMAGES = list(
    itertools.product(
        ["missing", "corrupt"], ["noto.png", "tokenizer.json", "codebook_32px.safetensors"]
    )
)


@pytest.mark.parametrize(
    ("damage", "name"),
    quick([("missing", "noto.png"), ("corrupt", "codebook_32px.safetensors")], DAMAGES),
)
def test_a_damaged_corpus_is_named_with_its_remedy(name, damage, tmp_path):
    # A copy of the package, so that nothing is damaged if the test is interrupted.
    package = tmp_path / "torchtitan_mixtures"
    shutil.copytree(ROOT / "torchtitan_mixtures", package)
    path = package / "data" / "corpora" / "emoji" / name
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content[:-1] + b"?")
    config = str(TRAIN_CONFIGS / "mot" / "debugmodel.toml")
    result = subprocess.run(
        [sys.executable, "-m", "torchtitan_mixtures.train", "--config", config],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2
    assert f"{name} is {damage}" in result.stderr
    assert "scripts/prepare_data.py emoji" in result.stderr
    assert "Traceback" not in result.stderr


def test_only_errors_of_ours_are_taken_for_the_users(capsys):
    codes = []

    def caught(function, *arguments):
        try:
            function(*arguments)
        except ValueError as error:
            return error
        raise AssertionError("no error")

    ours = caught(Multimodal, "emojis")
    theirs = caught(int, "x")
    assert user_error(ours) == str(ours)
    assert user_error(theirs) is None
    wrapped = CheckpointException("load", {0: (ours, StackSummary())})
    assert user_error(wrapped) == str(ours)
    assert user_error(CheckpointException("load", {0: (theirs, StackSummary())})) is None
    # What DCP wraps is no `Exception`: it must be caught all the same.
    for error, left in ((ours, [2]), (wrapped, [2, 2])):
        with one_message(leave=codes.append):
            raise error
        assert codes == left
    assert capsys.readouterr().err == f"error: {ours}\n" * 2
    for fault in (
        theirs,
        KeyError("x"),
        CheckpointException("load", {0: (theirs, StackSummary())}),
    ):
        with pytest.raises(type(fault)), one_message(leave=codes.append):
            raise fault
    assert codes == [2, 2]
