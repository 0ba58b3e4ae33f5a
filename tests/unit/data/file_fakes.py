"""Files of every kind, so that tests of sources can say what must come out of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from torchtitan_mixtures.data.audio import write_wav
from torchtitan_mixtures.data.blocks import BlockSource
from torchtitan_mixtures.data.file_sources import build_file_source
from torchtitan_mixtures.data.media import MediaReader
from torchtitan_mixtures.data.sources import Document, PairOrder
from torchtitan_mixtures.job_config import Multimodal
from torchtitan_mixtures.source_entries import SourceEntry

SIZE = 8
RATE = 8000


def open_source(
    kind: Any,
    path: Path | str,
    is_endless: bool = True,
    bad: float = 0.01,
    rate: int | None = RATE,
    **options: Any,
) -> BlockSource[Any]:
    entry = SourceEntry("own", kind, str(path), **options)
    order = PairOrder(0.5)
    config = Multimodal(max_bad_fraction=bad)
    return build_file_source(entry, config, MediaReader(SIZE, rate), order, is_endless)


def read_once(source: BlockSource[Any], count: int = 1) -> list[Document]:
    """All documents of a source that is not endless, shard after shard."""
    assert not source.is_endless
    return [document for shard in source.shards(range(count), count) for document in shard]


def text_of(document: Document) -> str:
    return next(s.payload for s in document.segments if isinstance(s.payload, str))


def content_of(document: Document) -> tuple[Any, ...]:
    """A document as something that compares."""
    return document.key, *(
        (s.modality, s.has_loss, s.payload if isinstance(s.payload, str) else s.payload.tobytes())
        for s in document.segments
    )


def picture(brightness: int = 128, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    color = brightness if mode == "L" else (brightness,) * 3
    Image.new(mode, (SIZE, SIZE), color).save(buffer, "PNG", **options)
    return buffer.getvalue()


def sound(samples: int = 160) -> bytes:
    buffer = io.BytesIO()
    write_wav(buffer, np.linspace(-0.5, 0.5, samples), RATE)
    return buffer.getvalue()


def make_tar(members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_jsonl(folder: Path, count: int) -> Path:
    """Texts of different lengths over three files, one of them without an end of its last line."""
    lines = [json.dumps({"text": f"row {i} " + "x" * (i * 37 % 300)}) for i in range(count)]
    for number in range(3):
        end = "" if number == 1 else "\n"
        (folder / f"{number}.jsonl").write_text("\n".join(lines[number::3]) + end)
    return folder


def write_parquet(folder: Path, count: int) -> Path:
    """Pairs over two files of several groups of rows."""
    for number in range(2):
        rows = [
            {"image": {"bytes": picture(i % 256), "path": None}, "caption": f"row {i}"}
            for i in range(number, count, 2)
        ]
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=7)
    return folder


def write_tars(folder: Path, count: int) -> Path:
    """Pairs over three tars."""
    for number in range(3):
        members = []
        for i in range(number, count, 3):
            members.append((f"d/{i:04}.png", picture(i % 256)))
            members.append((f"d/{i:04}.txt", f"row {i}\n".encode()))
        (folder / f"{number}.tar").write_bytes(make_tar(members))
    return folder


def write_images(folder: Path, count: int) -> Path:
    """Pairs in two folders, captions in files of all three kinds."""
    for i in range(count):
        place = folder / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        (place / f"{i}.png").write_bytes(picture(i % 256))
        suffix = (".txt", ".caption", ".json")[i % 3]
        caption = f"row {i}"
        text = json.dumps({"caption": caption}) if suffix == ".json" else caption
        (place / f"{i}{suffix}").write_text(text)
    return folder


WRITERS: dict[str, Callable[[Path, int], Path]] = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "webdataset": write_tars,
    "folder": write_images,
}
