"""What `scripts/benchmark.py data` measures: how fast sources, mixing and packing make batches.

Two corpora are written first, of captions and drawings of the embedded one: documents of text, and
pairs of a picture and its caption. Each is read as JSONL, tokenised on the fly, and as shards that
`scripts/prepare_data.py tokenize` has made of it. The model's part is not here: nothing is trained.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
from benchmark_parallel import MarkdownTable  # pyrefly: ignore [missing-import]  # beside this
from PIL import Image

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.checks import check_data
from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.data.loader import (
    MultimodalDataLoader,
    build_multimodal_dataloader,
    build_multimodal_tokenizer,
)
from torchtitan_mixtures.data.tokenize_job import job_recipe
from torchtitan_mixtures.data.tokenize_source import Tokenizing, tokenize
from torchtitan_mixtures.train import parse_job, quiet_the_host

CONFIG = Path(__file__).parent.parent / "train_configs" / "mot" / "debugmodel.toml"
MUST, AIM = 500_000, 2_000_000
"""Tokens per second of a worker that reads shards; design section 6."""

SEQ_LEN, BATCH = 2048, 8


@dataclass(frozen=True)
class Sizes:
    """How much is written, and how long it is read."""

    texts: int
    pairs: int
    seconds: float
    resume_tokens: int


FULL = Sizes(20_000, 4_000, 5.0, 10_000_000)
QUICK = Sizes(1_000, 200, 0.5, 200_000)


def write_texts(path: Path, count: int) -> None:
    """Documents of about 300 tokens: captions one after the other."""
    corpus, rng = EmojiCorpus.load(), random.Random(0)
    drawings = corpus.drawings("train")
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            captions = (corpus.caption(rng.choice(drawings), rng) for _ in range(24))
            file.write(json.dumps({"text": ". ".join(captions)}) + "\n")


def write_pairs(path: Path, count: int) -> None:
    """Pictures of 64 x 64 pixels as PNG, and their captions."""
    corpus, rng = EmojiCorpus.load(), random.Random(0)
    drawings = corpus.drawings("train")[:count]
    with path.open("w", encoding="utf-8") as file:
        for drawing, pixels in zip(drawings, corpus.images(drawings, 64), strict=True):
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            image = {"base64": base64.b64encode(content.getvalue()).decode()}
            pair = {"caption": corpus.caption(drawing, rng), "image": image}
            file.write(json.dumps(pair) + "\n")


def arguments_for(kind: str, path: Path, num_workers: int = 0) -> list[str]:
    """The command line of a job that reads one source."""
    source = [{"name": "benchmark", "kind": kind, "path": str(path)}]
    return [
        f"--config={CONFIG}",
        "--multimodal.source=mixture",
        f"--multimodal.sources={json.dumps(source)}",
        f"--training.seq_len={SEQ_LEN}",
        f"--training.local_batch_size={BATCH}",
        f"--training.dataloader.num_workers={num_workers}",
        "--validation.no-enable",
        "--sampling.interval=0",
    ]


def build(kind: str, path: Path, num_workers: int = 0) -> MultimodalDataLoader:
    """The loader of such a job."""
    job_config = parse_job(arguments_for(kind, path, num_workers), check_data)
    tokenizer = build_multimodal_tokenizer(job_config)
    return build_multimodal_dataloader(1, 0, tokenizer, job_config)


def prepare(folder: Path, sizes: Sizes) -> Iterator[tuple[str, str, Path]]:
    """Write the corpora and their shards: what it is of, kind and path of each."""
    quiet_the_host()
    writers = {"text": (write_texts, sizes.texts), "pairs": (write_pairs, sizes.pairs)}
    for what, (write, count) in writers.items():
        path, shards = folder / f"{what}.jsonl", folder / f"{what}_shards"
        write(path, count)
        recipe = job_recipe(arguments_for("jsonl", path), "benchmark", 1)
        tokenize(recipe, Tokenizing(out=shards), lambda line: None)
        yield what, "shards", shards
        yield what, "jsonl", path


def tokens_per_second(loader: MultimodalDataLoader, seconds: float) -> float:
    """Tokens, padding left out, of the batches that come after the first ones."""
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    before, start = loader.counts()[-1]["tokens"], time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
    return (loader.counts()[-1]["tokens"] - before) / (time.perf_counter() - start)


def measure_speed(options: argparse.Namespace, device: torch.device) -> Iterable[measure.Table]:
    """Tokens per second of one worker."""
    sizes = QUICK if options.quick else FULL
    columns = ["documents", "source", "in this process", "one worker", "must", "aim", ""]
    title = f"Tokens per second, sequences of {SEQ_LEN}, batches of {BATCH}"
    table = MarkdownTable(title, columns)
    with tempfile.TemporaryDirectory() as folder:
        for what, kind, path in prepare(Path(folder), sizes):
            here, worker = (tokens_per_second(build(kind, path, n), sizes.seconds) for n in (0, 1))
            is_judged = kind == "shards"
            verdict = measure.judge(-worker, -MUST, -AIM) if is_judged else ""
            targets = (f"{MUST:,}", f"{AIM:,}") if is_judged else ("", "")
            table.add(
                *(what, kind, f"{here:,.0f}", f"{worker:,.0f}", *targets, verdict),
                what=what, kind=kind, here=here, worker=worker,
            )  # fmt: skip
    yield table


def advance(loader: MultimodalDataLoader, tokens: int) -> Mapping[str, object]:
    """Read so many tokens; the state after them."""
    batches = iter(loader)
    for _ in itertools.takewhile(lambda _: loader.counts()[-1]["tokens"] < tokens, batches):
        pass
    return loader.state_dict()


def measure_start(options: argparse.Namespace, device: torch.device) -> Iterable[measure.Table]:
    """Seconds until the first batch, from the beginning and after many tokens."""
    sizes = QUICK if options.quick else FULL
    columns = ["documents", "source", "first batch s", f"resumed at {sizes.resume_tokens:,} s"]
    table = MarkdownTable("Seconds from building a loader to its first batch", columns)
    table.notes.append("in this process, with the modules that it needs already imported")
    with tempfile.TemporaryDirectory() as folder:
        for what, kind, path in prepare(Path(folder), sizes):
            state = advance(build(kind, path), sizes.resume_tokens)
            seconds = []
            for given in ({}, state):
                start = time.perf_counter()
                loader = build(kind, path)
                loader.load_state_dict(dict(given))
                next(iter(loader))
                seconds.append(time.perf_counter() - start)
            cells = (f"{each:.2f}" for each in seconds)
            table.add(what, kind, *cells, what=what, kind=kind, seconds=seconds)
    yield table


ROWS = {"speed": measure_speed, "start": measure_start}
