"""Commands that are written in READMEs and in TOMLs can be typed as they stand."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.jobs import ROOT, TRAIN_CONFIGS, load_job

DEFAULT = "train_configs/mot/debugmodel.toml"


def launch_lines():
    """Arguments of every `bash scripts/train.sh`, with where it is written."""
    files = [ROOT / "README.md", *ROOT.glob("torchtitan_mixtures/models/*/README.md")]
    found = {}
    for path in sorted([*files, *TRAIN_CONFIGS.glob("*/*.toml")]):
        text = re.sub(r"^# ?", "", path.read_text(), flags=re.M)
        text = re.sub(r"\\\n\s*", "", text)
        for line in re.findall(r"bash scripts/train\.sh(.*)", text):
            # What follows in wide gaps is a remark.
            line = re.split(r"\s+#|\s{2,}\(|\s{3,}|[`|]", line)[0]
            if "..." in line or "--help" in line:
                continue
            found[f"{path.parent.name}/{path.name}:{line}"] = shlex.split(line)
    return found


LINES = launch_lines()


def test_there_are_lines_of_every_family():
    configs = " ".join(words[0] for words in LINES.values() if words)
    assert all(f"train_configs/{path.name}/" in configs for path in TRAIN_CONFIGS.iterdir())


@pytest.mark.parametrize("where", LINES)
def test_the_arguments_of_a_launch_line_are_known(where):
    words = LINES[where]
    config = words.pop(0) if words and words[0].endswith(".toml") else DEFAULT
    load_job(ROOT / config, *words)  # exits at what it does not know
