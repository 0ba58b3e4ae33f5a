from __future__ import annotations

import dataclasses
import tomllib

import pytest

from tests.jobs import TRAIN_CONFIGS
from torchtitan_mixtures.checks import check_flavor
from torchtitan_mixtures.planning.candidates import Candidate, Layout
from torchtitan_mixtures.planning.toml_edit import edit_toml, toml_value, write_config
from torchtitan_mixtures.train import parse_job

FAST = ("mot/debugmodel.toml", "mot/8B_2modality.toml", "mone/B-16_imagenet21k.toml")
SLOW = sorted({str(p.relative_to(TRAIN_CONFIGS)) for p in TRAIN_CONFIGS.glob("*/*.toml")} - {*FAST})
CONFIGS = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]

CANDIDATE = Candidate(Layout(2, 1, 2, "1F1B", 2, 4), "selective", 8, 128).overrides()


def parsed(path, *overrides):
    values = dataclasses.asdict(parse_job([f"--config={path}", *overrides], check_flavor))
    values["job"].pop("config_file")
    return values


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_the_same_job_as_source_and_overrides(name, tmp_path):
    config, target = TRAIN_CONFIGS / name, tmp_path / "planned.toml"
    write_config(config, CANDIDATE, ["Planned."], target)
    assert parsed(target) == parsed(config, *CANDIDATE)
    lines = target.read_text(encoding="utf-8").splitlines()
    source = config.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# Planned.", ""]
    # Comments above the first section speak of the source's layout; others stay.
    first = next(place for place, line in enumerate(source) if line.startswith("["))
    comments = [line for line in source[first:] if line.startswith("#")]
    assert [line for line in lines[2:] if line.startswith("#")] == comments
    assert lines[2].startswith("[")
    sections = [line for line in source if line.startswith("[")]
    assert [line for line in lines if line.startswith("[")][: len(sections)] == sections


def test_overrides_in_any_form_of_the_command_line_are_written(tmp_path):
    source, target = TRAIN_CONFIGS / "mot" / "debugmodel.toml", tmp_path / "planned.toml"
    overrides = [
        "--validation.no-enable",
        *("--training.seq_len", "1024"),
        "--multimodal.image_tokenizer=emoji_64px",
        "--optimizer.lr=1e-5",
        "--compile.enable",
        "--compile.components=model,loss",
    ]
    write_config(source, overrides, [], target)
    assert parsed(target) == parsed(source, *overrides)
    assert tomllib.loads(target.read_text(encoding="utf-8"))["validation"]["enable"] is False


def test_comments_behind_values_stay_where_they_were():
    text = (
        "# above\n[training]   # of steps\nsteps = 10                # all\n\nseq_len = 5\n"
        '[model]\nname = "a # b"  # c # d\n'
    )
    edited = edit_toml(text, {"training": {"steps": 2000}, "model": {"name": "x#"}}, "text")
    assert edited == (
        "# above\n[training]   # of steps\nsteps = 2000              # all\n\nseq_len = 5\n"
        '[model]\nname = "x#"     # c # d\n'
    )


def test_keys_and_sections_that_are_missing_are_added():
    text = "[a]\nx = 1  # one\n\n# about b\n[b]\ny = 2\n\n"
    edited = edit_toml(text, {"a": {"z": True}, "c": {"w": 0.5}, "b.d": {"v": "q"}}, "text")
    assert edited == (
        '[a]\nx = 1  # one\nz = true\n\n# about b\n[b]\ny = 2\n\n[c]\nw = 0.5\n\n[b.d]\nv = "q"\n'
    )


def test_values_of_several_lines_are_replaced_whole():
    text = '[a]\nx = [\n  "[b]",  # y = 1\n  "2",\n]  # end\ny = """\n[b]\n"""\n[b]\ny = 1\n'
    edited = edit_toml(text, {"a": {"x": ["3"], "y": "short"}, "b": {"y": 2}}, "text")
    assert tomllib.loads(edited) == {"a": {"x": ["3"], "y": "short"}, "b": {"y": 2}}
    assert edited.splitlines()[1] == 'x = ["3"]  # end'


@pytest.mark.parametrize("text", ["a.x = 1\n", "a = { x = 1 }\n"])
def test_texts_that_cannot_be_edited_in_place_are_refused(text):
    with pytest.raises(ValueError, match=r"job\.toml: cannot be edited in place\. Write each"):
        edit_toml(text, {"a": {"x": 2}}, "job.toml")


@pytest.mark.parametrize(
    "value", [True, False, 3, -1, 0.25, 1e-30, "text", 'a "b"\\ # \n', "\u00e9", [], ["a", "b"]]
)
def test_values_are_read_back(value):
    assert tomllib.loads(f"x = {toml_value(value)}") == {"x": value}


def test_files_are_never_overwritten_and_folders_not_made(tmp_path):
    source, target = TRAIN_CONFIGS / "mot" / "debugmodel.toml", tmp_path / "planned.toml"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"planned\.toml: exists; name another file"):
        write_config(source, CANDIDATE, [], target)
    assert target.read_text(encoding="utf-8") == "mine"
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; make it first"):
        write_config(source, CANDIDATE, [], tmp_path / "nowhere" / "planned.toml")
