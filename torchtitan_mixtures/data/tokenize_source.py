"""Turns a source into pre-tokenised shards: in parallel, and going on after a kill.

The source is dealt into parts, the shards of one pass over it; `plan.json`, written first, says how
many there are and of what. A process makes a part at a time, and a part becomes a file that is
written whole or not at all. So what is there need not be made again, nothing is lost or there
twice, and no file depends on how many processes there are. `manifest.json` comes last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_mixtures.data.segment_encoder import SegmentEncoder
from torchtitan_mixtures.data.shard_manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PLAN,
    Manifest,
    ShardModality,
)
from torchtitan_mixtures.data.tokenize_parts import (
    PartMaker,
    PartPlan,
    Recipe,
    Tally,
    Tokenizable,
    count_parts,
    files_state,
    make_in_worker,
    start_worker,
)
from torchtitan_mixtures.data.tokenized_shards import TokenizedShards
from torchtitan_mixtures.data.tokenized_writing import FinishedPart, naming, write_whole

LOCK = ".lock"
"""Held by the run that writes a folder. The file stays: who deletes one may delete another's."""

_REPORT_SECONDS = 10.0
_MAX_KEYS = 20  # bad samples that the manifest names

Report = Callable[[str], None]


@dataclass(frozen=True)
class Tokenizing:
    """How to tokenise.

    Attributes:
        out: Folder to write.
        num_workers: Processes; 0: this one.
        shard_tokens: What a file should hold, about.
        parts: Files; 0: what follows from `shard_tokens`, or as the folder was begun with.
    """

    out: Path
    num_workers: int = 0
    shard_tokens: int = 1 << 26
    parts: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 0), ("shard_tokens", 1), ("parts", 0)):
            if getattr(self, name) < least:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} {getattr(self, name)}: must be at least {least}.")


def tokenize(recipe: Recipe, tokenizing: Tokenizing, report: Report) -> Manifest:
    """Tokenise a source, or what is left of it.

    Args:
        recipe: Opens the source.
        tokenizing: Where to, and how.
        report: Is told of progress, in lines.

    Returns:
        What was written as `manifest.json`.

    Raises:
        ValueError: The folder holds something else, another run writes it or the disk is full; the
            source is empty, or too many of its samples are bad.
    """
    out = tokenizing.out
    if out.exists() and (not out.is_dir() or (not (out / PLAN).is_file() and _has_files(out))):
        raise ValueError(f"--out {out}: exists and holds no shards; name a new folder.")
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        opened = recipe()
        assert not opened.source.is_endless or opened.source.max_epochs
        plan = _begin(opened, tokenizing)
        if (out / MANIFEST).is_file():
            report(f"{out} is complete already")
            return TokenizedShards(out).manifest
        content = json.dumps(plan, sort_keys=True).encode()
        parts = PartPlan(out, hashlib.sha256(content).hexdigest(), plan["parts"])
        run = _Run(recipe, opened, parts, report)
        finished = (
            run.in_processes(tokenizing.num_workers) if tokenizing.num_workers else run.here()
        )
        _judge(finished, opened.max_bad_fraction, out)
        manifest = _summarize(finished, plan)
        content = json.dumps(manifest.to_json(), indent=1).encode() + b"\n"
        write_whole(out / MANIFEST, lambda file: file.write(content))
        return manifest


def _has_files(out: Path) -> bool:
    """Whether there is anything in a folder but what an ended run may have left before its plan."""
    return any(path.name != LOCK and path.suffix != ".tmp" for path in out.iterdir())


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other runs out of a folder. The lock ends with the process, however that ends."""
    with naming(out / LOCK), (out / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out {out}: another run is writing it; wait for that one, or end it."
            ) from None
        for path in out.glob("*.tmp"):  # of a run that was killed
            path.unlink(missing_ok=True)
        yield


def _begin(opened: Tokenizable, tokenizing: Tokenizing) -> dict[str, Any]:
    """Write the plan, or check that the one that is there says the same.

    Raises:
        ValueError: It does not; names the first difference.
    """
    path = tokenizing.out / PLAN
    prints, sizes = opened.tokenizers.fingerprints(), SegmentEncoder(opened.tokenizers).vocab_sizes
    wanted = {
        "format_version": FORMAT_VERSION,
        "shard_tokens": tokenizing.shard_tokens,
        "source": {**opened.settings},
        "files": files_state(opened.source),
        "tokenizers": {
            name: {
                "tokenizer": opened.tokenizer_names[name],
                "fingerprint": prints[name],
                "vocab_size": size,
            }
            for name, size in sizes.items()
        },
    }
    wanted = json.loads(json.dumps(wanted))  # with lists for tuples, as it is read
    if not path.is_file():
        parts = tokenizing.parts or count_parts(opened, tokenizing.shard_tokens)
        plan = {**wanted, "parts": parts}
        content = json.dumps(plan, indent=1).encode() + b"\n"
        write_whole(path, lambda file: file.write(content))
        return plan
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = found.pop("parts")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: cannot be read; delete the folder, or name another.") from None
    wanted["parts"] = tokenizing.parts or parts
    found["parts"] = parts
    _require_same_files(tokenizing.out, found, wanted)
    if (difference := _difference("", found, wanted)) is not None:
        raise ValueError(
            f"--out {tokenizing.out}: was begun with {difference}. Name a new folder, or put it "
            "back."
        )
    return found


def _require_same_files(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError if the same source has files that were written since."""
    if found.get("source") == wanted["source"] and found.get("files") != wanted["files"]:
        raise ValueError(
            f"--out {out}: the data have changed since it was begun: a file of the source has "
            "another time of modification or size. Files of shards would hold the old and the new "
            "data; name a new folder, or delete this one."
        )


def _difference(key: str, found: Any, wanted: Any) -> str | None:
    """The first thing in which two plans differ, in words."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return None if found == wanted else f"{key} = {found!r}, which now is {wanted!r}"
    for name in {**found, **wanted}:
        inner = f"{key}: {name}" if key else name
        difference = _difference(inner, found.get(name), wanted.get(name))
        if difference is not None:
            return difference
    return None


class _Run:
    """Makes all parts, and says how far it is."""

    def __init__(self, recipe: Recipe, opened: Tokenizable, plan: PartPlan, report: Report) -> None:
        self._recipe = recipe
        self._opened = opened
        self._plan = plan
        self._report = report
        # Threads of a library would be inherited half by a fork.
        self._context = multiprocessing.get_context("spawn")
        self._numbers = self._context.Array("q", 4)
        self._tally = Tally(self._numbers)
        self._kept = sum(plan.path(part).is_file() for part in range(plan.count))
        self._begin = self._last = time.monotonic()
        if self._kept:
            report(f"{self._kept} of {plan.count} files are there already")

    def here(self) -> list[FinishedPart]:
        """In this process."""
        maker = PartMaker(self._opened, self._plan, self._tally)
        finished: list[FinishedPart] = []
        for part in range(self._plan.count):
            made = maker.make(part)
            assert made is not None
            finished.append(made)
            self._tell(len(finished))
        return finished

    def in_processes(self, num_workers: int) -> list[FinishedPart]:
        """In some processes of their own."""
        count = self._plan.count
        with (
            _one_thread_each(),
            ProcessPoolExecutor(
                min(num_workers, count),
                self._context,
                start_worker,
                (self._recipe, self._plan, self._numbers),
            ) as pool,
        ):
            futures = [pool.submit(make_in_worker, part) for part in range(count)]
            try:
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, 1.0, FIRST_COMPLETED)
                    for future in done:
                        if isinstance(problem := future.result(), str):
                            raise ValueError(problem)
                    self._tell(count - len(pending))
            except BrokenProcessPool as error:
                raise ValueError(
                    "A worker process has ended by itself: its own message is above, or it was "
                    "killed, as for lack of memory. Finished files are kept; run the same again, "
                    "perhaps with fewer --num-workers."
                ) from error
            finally:
                self._tally.stop()
                pool.shutdown(wait=False, cancel_futures=True)
        made = [future.result() for future in futures]
        return [part for part in made if isinstance(part, FinishedPart)]

    def _tell(self, num_finished: int) -> None:
        now = time.monotonic()
        if now < self._last + _REPORT_SECONDS and num_finished < self._plan.count:
            return
        self._last = now
        documents, codes, bad = self._tally.read()
        seconds = max(now - self._begin, 1e-9)
        self._report(
            f"{num_finished} of {self._plan.count} files; {documents} documents "
            f"({documents / seconds:.0f}/s), {codes} tokens ({codes / seconds:.0f}/s), "
            f"{bad} bad samples"
        )


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that are begun now compute with one thread: they share the processors."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _judge(finished: Sequence[FinishedPart], limit: float, out: Path) -> None:
    """Stop if too many samples are bad, or none is good."""
    samples = sum(part.notes.samples for part in finished)
    bad = sum(part.notes.bad_samples for part in finished)
    if not sum(part.file.documents for part in finished):
        raise ValueError(
            f"{out}: the source has no documents ({samples} samples, {bad} of them bad"
            f"{_examples(finished)}). Check its path and columns, and delete the folder."
        )
    if bad > limit * samples:
        raise ValueError(
            f"{bad} of {samples} samples ({bad / samples:.2%}) are bad; "
            f"multimodal.max_bad_fraction = {limit} allows {int(limit * samples)} of so many"
            f"{_examples(finished)}. Raise the limit and run again, which then writes {MANIFEST} "
            f"only; or repair the data, delete {out} and run again."
        )


def _examples(finished: Sequence[FinishedPart]) -> str:
    keys = _bad_keys(finished)[:5]
    return f". Among them: {'; '.join(keys)}" if keys else ""


def _bad_keys(finished: Sequence[FinishedPart]) -> list[str]:
    return [key for part in finished for key in part.notes.bad_keys]


def _summarize(finished: Sequence[FinishedPart], plan: dict[str, Any]) -> Manifest:
    """The manifest of all parts, in their order."""
    counts = [part.counts for part in finished]
    return Manifest(
        documents=sum(part.file.documents for part in finished),
        modalities=tuple(
            ShardModality(
                name,
                **about,
                documents=sum(count.documents[name] for count in counts),
                segments=sum(count.segments[name] for count in counts),
                codes=sum(count.codes[name] for count in counts),
            )
            for name, about in plan["tokenizers"].items()
        ),
        files=tuple(part.file for part in finished),
        source=plan["source"],
        samples=sum(part.notes.samples for part in finished),
        bad_samples=sum(part.notes.bad_samples for part in finished),
        bad_keys=tuple(_bad_keys(finished)[:_MAX_KEYS]),
    )
