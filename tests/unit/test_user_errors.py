"""What a worker process of a loader raises ends as it would without workers: in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch._utils import ExceptionWrapper

from tests.jobs import ROOT, TRAIN_CONFIGS
from torchtitan_mixtures.data.audio import check_waveform
from torchtitan_mixtures.multimodal_config import Multimodal
from torchtitan_mixtures.user_errors import one_message, user_error


def ours() -> object:
    return Multimodal("emojis")  # pyrefly: ignore [bad-argument-type]


def ours_after_theirs() -> object:
    try:
        return int("x")
    except ValueError:
        return ours()


def ours_from_below() -> None:
    check_waveform(np.zeros((1, 2), "U1"))  # pyrefly: ignore [bad-argument-type]


def theirs() -> object:
    return int("x")


def theirs_after_ours() -> object:
    try:
        return ours()
    except ValueError:
        return int("x")


def raised(fail: Callable[[], object], in_worker: bool) -> Exception:
    """What a loader raises of an error; with workers, by what PyTorch does in one and after it."""
    with pytest.raises(ValueError) as caught:
        if not in_worker:
            fail()
        try:
            fail()
        except ValueError:
            wrapper = ExceptionWrapper(where="in DataLoader worker process 3")
        wrapper.reraise()
    return caught.value


@pytest.mark.parametrize("fail", [ours, ours_after_theirs, ours_from_below])
def test_errors_of_ours_have_the_same_message_from_a_worker(
    fail: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = user_error(raised(fail, in_worker=False))
    error = raised(fail, in_worker=True)
    assert "Traceback" in str(error)
    assert expected and user_error(error) == expected
    codes: list[int] = []
    with one_message(leave=codes.append):
        raise error
    assert codes == [2] and capsys.readouterr().err == f"error: {expected}\n"


@pytest.mark.parametrize("fail", [theirs, theirs_after_ours])
def test_faults_in_a_worker_keep_their_traceback(fail: Callable[[], object]) -> None:
    error = raised(fail, in_worker=True)
    assert user_error(error) is None
    with pytest.raises(ValueError, match="Traceback"), one_message(leave=lambda code: None):
        raise error


def test_a_message_is_taken_whole_and_only_of_what_pytorch_has_made() -> None:
    file = Path(sys.modules[one_message.__module__].__file__ or "")
    frames = f'  File "{file}", line 3, in check\n    raise ValueError(text)\n    ^^^^^^\n'
    header = "Caught ValueError in DataLoader worker process 7.\nOriginal "
    text = f"{header}Traceback (most recent call last):\n{frames}ValueError: a: b\n  c: d\n"
    assert user_error(make_error(text)) == "a: b\n  c: d"
    for other in (text.replace(str(file), "/elsewhere/user_errors.py"), header, "a: b"):
        assert user_error(make_error(other)) is None
    assert user_error(make_error(text.removeprefix(header))) is None


def make_error(text: str) -> ValueError:
    """An error that, like one of a worker, was raised outside the package."""
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_bad_samples_ends_in_one_line(tmp_path: Path, num_workers: int) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"caption": "a fox", "image": "gone.png"}\n' * 20)
    sources = json.dumps([{"name": "broken", "kind": "jsonl", "path": str(data)}])
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"),
        *("-m", "torchtitan_mixtures.train"),
        f"--config={TRAIN_CONFIGS / 'mot' / 'debugmodel.toml'}",
        *("--multimodal.source=mixture", f"--multimodal.sources={sources}"),
        *("--validation.no-enable", f"--job.dump_folder={tmp_path / 'out'}"),
        f"--training.dataloader.num_workers={num_workers}",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    own = result.stderr.partition("ChildFailedError")[0]
    assert "[rank0]: Traceback" not in own and "DataLoader worker" not in own
    (line,) = [line for line in own.splitlines() if line.startswith("error: ")]
    assert 'of source "broken" are bad; multimodal.max_bad_fraction' in line
