"""Tokenizing a source: every document once whatever happens to the process, and bad samples."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.shard_fakes import (
    NAMES,
    TOKENIZERS,
    PrintedImage,
    ToySource,
    content,
    open_toy,
    plain,
    read_naively,
)
from torchtitan_mixtures.data.mixture import SourceTokenizers
from torchtitan_mixtures.data.segment_encoder import SegmentEncoder
from torchtitan_mixtures.data.shard_manifest import MANIFEST, PLAN, Manifest
from torchtitan_mixtures.data.tokenize_parts import (
    Tokenizable,
)
from torchtitan_mixtures.data.tokenize_source import LOCK, Tokenizing, tokenize


def run(out: Path, recipe: Callable[[], Tokenizable] = open_toy, **options: Any) -> Manifest:
    options = {"parts": 4, **options}
    return tokenize(recipe, Tokenizing(out, **options), lambda line: None)


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    run(tmp_path / "undisturbed")
    return content(tmp_path / "undisturbed")


def test_shards_hold_the_documents_of_the_source_in_its_order(tmp_path: Path) -> None:
    manifest = run(tmp_path / "out")
    expected = [plain(document) for shard in ToySource().shards(range(4), 4) for document in shard]
    assert read_naively(tmp_path / "out") == expected
    assert manifest.documents == len(expected) > 50
    assert any(is_pair for _, is_pair in expected)
    for modality in manifest.modalities:
        of_it = [[s for s in segments if s[0] == modality.name] for segments, _ in expected]
        assert modality.documents == sum(map(bool, of_it))
        assert modality.segments == sum(map(len, of_it))
        assert modality.codes == sum(len(s[1]) for segments in of_it for s in segments)
        assert modality.tokenizer == NAMES[modality.name]


def test_one_part_has_the_documents_as_one_pass_gives_them(tmp_path: Path) -> None:
    run(tmp_path / "out", parts=1)
    assert read_naively(tmp_path / "out") == [
        plain(d) for d in next(iter(ToySource().shards([0], 1)))
    ]


def test_more_parts_than_blocks_leave_files_without_documents(tmp_path: Path) -> None:
    manifest = run(tmp_path / "out", parts=23)
    assert sum(file.documents == 0 for file in manifest.files) >= 3
    assert len(read_naively(tmp_path / "out")) == manifest.documents


def test_two_worker_processes_write_what_one_writes(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    run(tmp_path / "out", num_workers=2)
    assert content(tmp_path / "out") == undisturbed


class Dying:
    """Counts what happens to files, and ends it all at one of these events."""

    def __init__(self, at: int, end: Callable[[], None]) -> None:
        self.left, self._end = at, end

    def wrap(self, function: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options) if after else None
            self.left -= 1
            if self.left == 0:
                self._end()
            return result if after else function(*arguments, **options)

        return wrapped


def disturb(monkeypatch: pytest.MonkeyPatch, dying: Dying) -> None:
    monkeypatch.setattr(os, "fsync", dying.wrap(os.fsync, after=False))
    monkeypatch.setattr(Path, "replace", dying.wrap(Path.replace, after=False))
    monkeypatch.setattr(Path, "replace", dying.wrap(Path.replace, after=True))
    encode = SegmentEncoder.encode_documents
    monkeypatch.setattr(SegmentEncoder, "encode_documents", dying.wrap(encode, after=False))


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_and_what_was_written_is_kept(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_events = 0
    for at in itertools.count(1):
        out = tmp_path / f"out{at}"
        with monkeypatch.context() as patched:
            disturb(patched, dying := Dying(at, disk_full))
            try:
                run(out)
            except ValueError as error:
                assert str(out) in str(error) and "No space left" in str(error)
            except OSError:  # the encoder's: no file to name
                pass
        assert not list(out.glob("*.tmp"))
        run(out)
        assert content(out) == undisturbed
        if dying.left > 0:
            num_events = at - 1
            break
    assert num_events > 15


def in_a_fork(target: Callable[[], object]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    return process.exitcode


def test_a_run_that_is_killed_anywhere_goes_on_without_loss_or_repetition(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    out, kills = tmp_path / "out", 0
    rng = random.Random(5)
    while True:
        with monkeypatch.context() as patched:
            disturb(patched, Dying(rng.randint(1, 6), die))
            code = in_a_fork(lambda: run(out))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert content(out) == undisturbed


def test_a_run_that_is_killed_often_in_its_first_steps_leaves_a_folder_to_go_on_with(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 12):
        out = tmp_path / f"out{at}"
        with monkeypatch.context() as patched:
            dying = Dying(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            disturb(patched, dying)
            in_a_fork(lambda out=out: run(out))
        run(out)
        assert content(out) == undisturbed


def children_of(process: int) -> set[int]:
    """Processes that a process has begun, Python's own helper among them."""
    return {
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if int(path.read_text().rsplit(")", 1)[1].split()[1]) == process
    }


# No library that lists the children of a process is among our dependencies.
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_a_killed_run_takes_its_workers_along_and_goes_on_with_any_number(tmp_path: Path) -> None:
    recipe = partial(open_toy, 4000)
    run(tmp_path / "undisturbed", recipe, parts=40)
    out, rng = tmp_path / "out", random.Random(2)
    program = (
        "from functools import partial; from pathlib import Path\n"
        "from tests.unit.data.shard_fakes import open_toy\n"
        "from torchtitan_mixtures.data.tokenize_source import Tokenizing, tokenize\n"
        "if __name__ == '__main__':\n"
        f"    out = Tokenizing(Path({str(out)!r}), num_workers=2, parts=40)\n"
        "    tokenize(partial(open_toy, 4000), out, print)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        before = len(list(out.glob("*.safetensors")))
        process = subprocess.Popen([sys.executable, str(script)], env=environment)
        while len(list(out.glob("*.safetensors"))) < before + 2 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() / 10)
        children = children_of(process.pid)
        process.kill()
        process.wait()
        assert len(children) >= 2
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "workers outlive the run"
            time.sleep(0.05)
    assert 3 <= len(list(out.glob("*.safetensors"))) < 40
    run(out, recipe, parts=40)
    assert content(out) == content(tmp_path / "undisturbed")


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="source: blocks = 20, which now is 21"):
        run(tmp_path, partial(open_toy, 21))
    with pytest.raises(ValueError, match="parts = 4, which now is 5"):
        run(tmp_path, parts=5)
    with pytest.raises(ValueError, match="shard_tokens = 67108864, which now is 7"):
        run(tmp_path, shard_tokens=7)
    (tmp_path / PLAN).write_text("[]")
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path)


class OtherImage(PrintedImage):
    def fingerprint(self) -> str:
        return "other"


def test_another_tokenizer_is_refused_in_the_folder_of_the_first(tmp_path: Path) -> None:
    run(tmp_path)

    def other() -> Tokenizable:
        opened = open_toy()
        tokenizers = SourceTokenizers(TOKENIZERS.text, OtherImage(), TOKENIZERS.speech)
        return Tokenizable(opened.source, tokenizers, NAMES, opened.settings, 0.5)

    with pytest.raises(ValueError, match=r"tokenizers: image: fingerprint = .*now is 'other'"):
        run(tmp_path, other)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ValueError, match="holds no shards"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(ValueError, match="holds no shards"):
        run(tmp_path / "precious")


def test_a_second_run_on_a_folder_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    refusals: list[str] = []

    def recipe() -> Tokenizable:  # is called while the folder is held
        with pytest.raises(ValueError, match="another run is writing it") as caught:
            run(tmp_path)
        refusals.append(str(caught.value))
        return open_toy()

    run(tmp_path, recipe)
    assert len(refusals) == 1
    run(tmp_path)


def test_a_complete_folder_is_not_made_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != LOCK}
    lines: list[str] = []
    assert tokenize(open_toy, Tokenizing(tmp_path), lines.append) == first
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert lines == [f"{tmp_path} is complete already"]


def test_a_deleted_file_is_made_again_as_it_was(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    run(tmp_path / "out")
    (tmp_path / "out/shard-000002.safetensors").unlink()
    (tmp_path / "out" / MANIFEST).unlink()
    run(tmp_path / "out")
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("place", [9, 300, -1, -600])
def test_a_finished_file_that_was_damaged_meanwhile_is_not_taken_for_good(
    tmp_path: Path, place: int
) -> None:
    run(tmp_path)
    path = tmp_path / "shard-000001.safetensors"
    octets = bytearray(path.read_bytes())
    octets[place] ^= 4
    path.write_bytes(octets)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"shard-000001.*Delete it"):
        run(tmp_path)


def test_a_file_of_another_run_is_not_taken_for_a_part(tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "other", partial(open_toy, 19))
    (tmp_path / "one" / MANIFEST).unlink()
    foreign = tmp_path / "other/shard-000003.safetensors"
    foreign.replace(tmp_path / "one/shard-000003.safetensors")
    with pytest.raises(ValueError, match="was made with other settings"):
        run(tmp_path / "one")


def ending_in_a_worker() -> Tokenizable:
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    return open_toy()


@pytest.mark.slow
def test_a_worker_process_that_ends_by_itself_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A worker process has ended by itself"):
        run(tmp_path, ending_in_a_worker, num_workers=1)


def test_progress_is_told_at_the_end(tmp_path: Path) -> None:
    lines: list[str] = []
    manifest = tokenize(open_toy, Tokenizing(tmp_path, parts=3), lines.append)
    tokens = sum(modality.codes for modality in manifest.modalities)
    assert lines[-1].startswith(f"3 of 3 files; {manifest.documents} documents (")
    assert f"), {tokens} tokens (" in lines[-1] and "0 bad samples" in lines[-1]


@pytest.mark.parametrize("option", ["num_workers", "parts"])
def test_negative_numbers_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} -1"):
        Tokenizing(tmp_path, **{option: -1})
