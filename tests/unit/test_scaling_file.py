"""Files of scaling studies: what they train, and what is refused before anything runs."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from tests.gang import run_ranks
from tests.jobs import ROOT, TRAIN_CONFIGS, debug_job
from tests.runs import run_to_the_end
from torchtitan_mixtures.models import FAMILIES
from torchtitan_mixtures.models.mot import mot_args
from torchtitan_mixtures.studies import scaling_runs
from torchtitan_mixtures.studies.scaling_file import Metric, read_study
from torchtitan_mixtures.studies.scaling_plan import plan_runs
from torchtitan_mixtures.studies.scaling_scalars import read_scalars
from torchtitan_mixtures.studies.scaling_tags import check_tag
from torchtitan_mixtures.train import parse_job
from torchtitan_mixtures.trainer import MixtureTrainer

LADDER = ROOT / "studies" / "mot_ladder.toml"
CONFIG = TRAIN_CONFIGS / "mot" / "debugmodel.toml"
TAG = "validation/unseen_concept/loss"
STEPS = 4


def debug_config(family):
    return TRAIN_CONFIGS / family / "debugmodel.toml"


GOOD = f"""
name = "tiny"
seeds = [0, 3]
overrides = ["--training.steps={STEPS}", "--validation.freq=2", "--metrics.log_freq=2"]
[metric]
tag = "{TAG}"
[[runs]]
label = "MoT"
config = "{CONFIG}"
flavors = ["ladder1", "ladder2"]
overrides = ["--optimizer.lr=0.5"]
[[runs]]
label = "dense"
config = "{CONFIG}"
flavors = ["ladder1_dense"]
"""


def study_file(folder, *changes):
    """A study's file, with texts replaced by others."""
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def test_each_flavour_is_trained_once_for_each_seed(tmp_path):
    path = study_file(tmp_path)
    study = read_study(path)
    runs = plan_runs(path, study)
    names = ["MoT-ladder1-0", "MoT-ladder1-3", "MoT-ladder2-0", "MoT-ladder2-3"]
    assert [run.name for run in runs] == [*names, "dense-ladder1_dense-0", "dense-ladder1_dense-3"]
    assert study.folder == Path("outputs/studies/tiny")
    mot, dense = runs[1], runs[5]
    assert (mot.seed, mot.job["debug"]["seed"], mot.job["multimodal"]["seed"]) == (3, 3, 3)
    assert (mot.steps, mot.job["optimizer"]["lr"], dense.job["optimizer"]["lr"]) == (4, 0.5, 3e-3)
    # The flavour's, and the rows of 1,024 codes; a vocabulary of 3,072 is looked up.
    assert mot.facts.stored == 307_632 + 2 * 1024 * 48
    assert mot.facts.active == dense.facts.active == dense.facts.stored == 252_144 + 2 * 1024 * 48
    assert mot.facts.non_embedding == mot.facts.active - 3072 * 48
    attention = 12 * 2 * 48 * 2048
    assert mot.facts.flops_per_token == 6 * mot.facts.non_embedding + attention
    command = scaling_runs.train_command(Path("out"), mot, study, ["torchrun"])
    start = ["torchrun", "--standalone", "--nproc_per_node=1", "-m", "torchtitan_mixtures.train"]
    assert command == [*start, *mot.arguments, "--job.dump_folder=out/runs/MoT-ladder1-3"]


BAD = {
    "no TOML": (('name = "tiny"', "name = "), r"not valid TOML"),
    "an unknown key": (("seeds =", "seds ="), r"seds: unknown key; did you mean seeds, threads\?"),
    "an unknown key of an entry": (
        ("flavors = [\"ladder1_dense", "flavor = [\"ladder1_dense"),
        r"runs\[1\]\.flavor: unknown key; did you mean runs\[1\]\.flavors\?",
    ),
    "a missing key": ((f'tag = "{TAG}"', ""), r"metric\.tag: is missing; set it"),
    "no entries": (("[[runs]]", "[[other]]"), r"runs: one or more \[\[runs\]\]"),
    "a wrong type": (("[0, 3]", '"all"'), r"seeds = 'all': must be a list of an integer"),
    "equal seeds": (("[0, 3]", "[1, 1]"), r"seeds = \[1, 1\]: must be one or more different"),
    "a name that is no folder": (('"tiny"', '"a/b"'), r"name = 'a/b': must be letters"),
    "a name that is another folder": (('"tiny"', '".."'), r"name = '\.\.': must be .* not dots"),
    "an unknown key of the metric": (("tag =", "tags ="), r"metric\.tags: unknown key; did"),
    "a metric that is no table": (
        (f'[metric]\ntag = "{TAG}"', 'metric = "loss"'),
        r"metric = 'loss': must be a section, \[metric\]",
    ),
    "equal flavours": (('"ladder1", "ladder2"', '"ladder1", "ladder1"'), r"runs\[0\].*must differ"),
    "no flavours": (('["ladder1_dense"]', "[]"), r"runs\[1\]: label = 'dense', flavors = \[\]"),
    "an own key": (
        ("--optimizer.lr=0.5", "--debug.seed=1"),
        r"runs\[0\]\.overrides: '--debug\.seed=1': the study sets debug\.seed itself.*remove it",
    ),
    "an own key with a dash": (
        ("--optimizer.lr=0.5", "--job.dump-folder=x"),
        r"runs\[0\]\.overrides: '--job\.dump-folder=x': the study sets job\.dump_folder itself",
    ),
    "a call for help": (
        ("--optimizer.lr=0.5", "--help"),
        r"runs\[0\]\.overrides: '--help': would train nothing; remove it",
    ),
    "a call for help in short": (("--metrics.log_freq=2", "-h"), r"overrides: '-h': would train"),
    "a script for a shell": (
        ("--optimizer.lr=0.5", "--tyro-write-completion=bash"),
        r"runs\[0\]\.overrides: '--tyro-write-completion=bash': would train nothing",
    ),
    "overrides of a flavour that is not there": (
        ('overrides = ["--optimizer.lr=0.5"]', 'overrides_of = { ladder9 = [] }'),
        r"runs\[0\] \('MoT'\): overrides_of\.ladder9: is no flavour of this entry, flavors = "
        r"\['ladder1', 'ladder2'\]; add it there, or remove it",
    ),
    "overrides of a flavour that are no list": (
        ('overrides = ["--optimizer.lr=0.5"]', 'overrides_of = { ladder1 = "--optimizer.lr=1" }'),
        r"runs\[0\]\.overrides_of = .*: must be a table",
    ),
    "an own key among those of a flavour": (
        ('overrides = ["--optimizer.lr=0.5"]', 'overrides_of.ladder1 = ["--model.flavor=x"]'),
        r"runs\[0\]\.overrides_of\.ladder1: '--model\.flavor=x': the study sets",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused(what, tmp_path):
    change, message = BAD[what]
    with pytest.raises(ValueError, match=rf"tiny\.toml: {message}"):
        read_study(study_file(tmp_path, change))


def test_overrides_of_a_flavour_win_over_those_of_the_entry_and_concern_no_other(tmp_path):
    of_one = '[runs.overrides_of]\nladder2 = ["--optimizer.lr=0.25", "--training.max_norm", "2"]\n'
    path = study_file(tmp_path, ('lr=0.5"]\n', f'lr=0.5"]\n{of_one}'))
    runs = {run.name: run for run in plan_runs(path, read_study(path))}
    one, other = runs["MoT-ladder1-0"].job, runs["MoT-ladder2-0"].job
    assert (one["optimizer"]["lr"], one["training"]["max_norm"]) == (0.5, 1.0)
    assert (other["optimizer"]["lr"], other["training"]["max_norm"]) == (0.25, 2.0)
    assert runs["dense-ladder1_dense-0"].job["optimizer"]["lr"] == 3e-3


BAD_RUNS = {
    "an unknown flavour": (
        ('"ladder2"]', '"ladder9"]'),
        r"runs\[0\] \('MoT'\), flavor 'ladder9': model\.flavor = 'ladder9' is not a flavour of "
        r"'mot'; known flavours: .*ladder4",
    ),
    "an unknown key": (
        ("--optimizer.lr=0.5", "--optimizer.lrr=0.5"),
        r"runs\[0\] .*overrides: Unrecognized options: --optimizer\.lrr=0\.5; did you mean .*--opt",
    ),
    "a value of another type": (
        ("--optimizer.lr=0.5", "--optimizer.lr=fast"),
        r"overrides: Error parsing --optimizer\.lr: could not convert string to float: 'fast'",
    ),
    "a bad value": (("lr=0.5", "lr=-1"), r"'ladder1': optimizer\.lr = -1\.0: must be"),
    "no such configuration": ((str(CONFIG), "no.toml"), r"--config /.*no\.toml: cannot be read"),
    "no checkpoints": (("--optimizer.lr=0.5", "--checkpoint.no_enable"), r"checkpoint\.enable ="),
    "a last step that is not logged": (
        ("log_freq=2", "log_freq=3"),
        r"metrics\.log_freq = 3: must be a divisor of training\.steps = 4",
    ),
    "a last step that is not validated": (
        ("validation.freq=2", "validation.freq=3"),
        r"validation\.freq = 3: must be",
    ),
    "an unknown split": (
        ("unseen_concept", "unseen"),
        r"metric\.tag = 'validation/unseen/loss': must be of a split in .*unseen_concept",
    ),
    "no validation": (
        ("--optimizer.lr=0.5", "--validation.no_enable"),
        r"validation\.enable = false: must be true, for 'validation/unseen_concept/loss'",
    ),
    "a part of a split that is not scored": (
        (TAG, "validation/unseen_concept/los"),
        r"metric\.tag = 'validation/unseen_concept/los': is not logged; set .*concept/loss",
    ),
    "an unknown modality": (
        (TAG, "validation/unseen_concept/speech/loss"),
        r"metric\.tag = '.*/speech/loss': is not logged; .*validation/unseen_concept/text/loss",
    ),
    "an unknown loss": (
        (TAG, "loss_metrics/avg_loss"),
        r"metric\.tag = 'loss_metrics/avg_loss': is not logged; .*loss_metrics/global_avg_loss",
    ),
    "a tag of nothing": ((TAG, "loss"), r"metric\.tag = 'loss': is not logged; .*global_avg_loss"),
    "a mean of more than there is": (
        (f'tag = "{TAG}"', f'tag = "{TAG}"\nlast = 4'),
        r"metric\.last = 4: must be at most 3, as often as '.*' is logged in training\.steps = 4",
    ),
    "a run that is there twice": (
        ('"dense"', '"MoT"'),
        "nothing",
    ),
    "too many processes": (
        ("seeds =", "nproc_per_node = 3\nseeds ="),
        r"runs\[0\]",
    ),
}


@pytest.mark.parametrize("what", BAD_RUNS)
def test_a_file_with_runs_that_cannot_be_is_refused(what, tmp_path):
    change, message = BAD_RUNS[what]
    changes = [change]
    if what == "a run that is there twice":
        changes.append(('"ladder1_dense"', '"ladder1"'))
        message = r"runs\[1\] .*there is a run 'MoT-ladder1-0' already; give one .* another label"
    if what == "too many processes":
        changes.append(("--optimizer.lr=0.5", "--parallelism.tensor_parallel_degree=2"))
    path = study_file(tmp_path, *changes)
    before = dict(os.environ)
    with pytest.raises(ValueError, match=rf"tiny\.toml: .*{message}"):
        plan_runs(path, read_study(path))
    assert dict(os.environ) == before


CAPACITIES = ["--nested.validation_capacities", "0.5", "1.0"]
GOOD_TAGS = [
    ("mot", [], "loss_metrics/global_max_loss"),
    ("mot", [], "modality/text/bits_per_token"),
    ("mot", [], "validation/unseen_style/image/loss"),
    ("mot", [], "grad_norm/text"),
    ("mom", [], "validation/unseen_style/0.0625/loss"),
    ("mom", [], "noise/0.125/loss"),
    ("mom", [], "router/balance_loss"),
    ("mixdiff", [], "validation/unseen_style/router/accuracy"),
    ("mone", [], "validation/unseen_style/top_5_accuracy"),
    ("mone", [], "train/accuracy"),
    ("mone", CAPACITIES, "validation/unseen_style/capacity_0.5/loss"),
]


@pytest.mark.parametrize(("family", "overrides", "tag"), GOOD_TAGS)
def test_tags_of_every_kind_of_model_are_known(family, overrides, tag):
    check_tag(Metric(tag), parse_job([f"--config={debug_config(family)}", *overrides]))


BAD_TAGS = [
    ("mom", [], "validation/unseen_style/accuracy"),
    ("mom", [], "validation/unseen_style/router/accuracy"),
    ("mom", [], "modality/text/loss"),
    ("mone", [], "validation/unseen_style/capacity_0.5/loss"),
    ("mone", CAPACITIES, "validation/unseen_style/loss"),
]


@pytest.mark.parametrize(("family", "overrides", "tag"), BAD_TAGS)
def test_tags_of_another_kind_of_model_are_refused(family, overrides, tag):
    job = parse_job([f"--config={debug_config(family)}", *overrides])
    with pytest.raises(
        ValueError, match=r"metric\.tag = '.*': is not logged; set it to one that is"
    ):
        check_tag(Metric(tag), job)


def log_two_steps(family, folder):
    """Train two steps; the tags of what is logged, and those of them that are refused."""
    steps = ["--training.steps=2", "--validation.freq=2", "--validation.steps=1"]
    job = debug_job(family, "--checkpoint.no_enable", *steps, f"--job.dump_folder={folder}")
    trainer = MixtureTrainer(job)
    run_to_the_end(trainer)
    trainer.close()
    tags, refused = list(read_scalars(folder)), []
    for tag in tags:
        try:
            check_tag(Metric(tag), job)
        except ValueError as error:
            refused.append(str(error))
    return tags, refused


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_run_logs_may_be_compared(family, tmp_path):
    ((tags, refused),) = run_ranks(log_two_steps, 1, family, tmp_path)
    assert refused == [] and len(tags) > 20
    assert {tag.split("/")[0] for tag in tags} > {"loss_metrics", "validation", "time_metrics"}


def test_the_ladder_trains_what_it_did_when_each_size_had_an_entry_of_its_own(tmp_path):
    text = LADDER.read_text().replace("seeds = [0, 1]", "seeds = [1]")
    assert "seeds = [1]" in text
    entries = [
        f'[[runs]]\nlabel = "{label}"\nconfig = "{CONFIG}"\nflavors = ["ladder{number}{suffix}"]\n'
        f'overrides = ["--optimizer.lr={rate}"]\n'
        for label, suffix in (("MoT", ""), ("dense", "_dense"))
        for number, rate in enumerate(("6.93e-03", "4.90e-03", "3.79e-03", "3.00e-03"), 1)
    ]
    planned = []
    for name, content in {
        "new": text.replace("../train_configs", str(TRAIN_CONFIGS)),
        "old": text[: text.index("[[runs]]")] + "".join(entries),
    }.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(content)
        planned.append(plan_runs(path, read_study(path)))
    assert planned[0] == planned[1] and len(planned[0]) == 8


def test_the_ladder_compares_equal_active_parameters_and_flops():
    study = read_study(LADDER)
    runs = {run.name: run for run in plan_runs(LADDER, study)}
    assert len(runs) == 4 * 2 * 2
    sizes = []
    for number in range(1, 5):
        mot, dense = runs[f"MoT-ladder{number}-0"], runs[f"dense-ladder{number}_dense-0"]
        assert mot.facts.active == dense.facts.active == dense.facts.stored < mot.facts.stored
        assert mot.facts.flops_per_token == dense.facts.flops_per_token
        rate = 3e-3 * (256 / mot_args[mot.flavor].dim) ** 0.5
        assert mot.job["optimizer"]["lr"] == pytest.approx(rate, rel=2e-3)
        jobs = [mot.job, dense.job, runs["MoT-ladder1-0"].job]
        for job in jobs:
            job["model"] = job["optimizer"]["lr"] = None
        assert jobs[0] == jobs[1] == jobs[2]
        sizes.append(mot.facts.non_embedding)
    assert all(2.5 < b / a < 3.5 for a, b in pairwise(sizes))
