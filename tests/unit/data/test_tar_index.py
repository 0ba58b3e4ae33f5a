"""The index of tars against `tarfile`, and samples of tars as WebDataset groups them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.file_fakes import (
    SIZE,
    make_tar,
    open_source,
    picture,
    read_once,
    sound,
    text_of,
)
from torchtitan_mixtures.data import webdataset_source
from torchtitan_mixtures.data.tar_index import Member, read_index

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def index_of(tmp_path: Path, content: bytes) -> list[Member]:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    return read_index(path)


def with_links(**infos: Any) -> bytes:
    """An archive of members without content, types by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in infos.items():
            info = tarfile.TarInfo(f"{name}.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return buffer.getvalue()


# --- index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_index_is_that_of_tarfile(format: str, tmp_path: Path) -> None:
    names = ["a.txt", "d/e/f.jpg", "x" * 98 + ".a", "p" * 90 + "/" + "q" * 90 + ".txt"]
    if format != "ustar":
        names += ["r" * 150 + "/" + "s" * 250 + ".png", "\u00e4\u4e2d.txt"]
    members = [(name, b"z" * (i * 511)) for i, name in enumerate(names)]
    content = make_tar(members, FORMATS[format])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [Member(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert index_of(tmp_path, content) == expected
    assert [member.name for member in expected] == names


def test_folders_and_comments_are_passed_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    headers = {"comment": "hello"}
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers
    ) as archive:
        folder = tarfile.TarInfo("../up")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"mtime": "1.5", "size": "3"}
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert [(m.name, m.size, m.error) for m in index_of(tmp_path, buffer.getvalue())] == [
        ("a.txt", 3, "")
    ]


def test_a_size_in_base_256_is_understood(tmp_path: Path) -> None:
    content = bytearray(make_tar([("a.txt", b"abc")]))
    content[124:136] = b"\x80" + (3).to_bytes(11, "big")
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 256 + sum(content[156:512]))
    assert index_of(tmp_path, bytes(content)) == [Member("a.txt", 512, 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [("../a.txt", "leads out"), ("/a.txt", "leads out"), ("b/../../a.txt", "leads out")],
)
def test_names_that_lead_out_are_errors(name: str, message: str, tmp_path: Path) -> None:
    bad, good = index_of(tmp_path, make_tar([(name, b"x"), ("b.txt", b"y")]))
    assert message in bad.error and not good.error


def test_links_and_devices_are_errors(tmp_path: Path) -> None:
    content = with_links(
        a=tarfile.SYMTYPE, b=tarfile.LNKTYPE, c=tarfile.CHRTYPE, d=tarfile.FIFOTYPE, e=b"Z"
    )
    errors = [member.error for member in index_of(tmp_path, content)]
    for error, word in zip(errors, ["link", "link", "device", "pipe", "b'Z'"], strict=True):
        assert word in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"x" * 2000, "not a tar"),
        (b"short", "not a tar"),
        (gzip.compress(make_tar([("a.txt", b"x")]), mtime=0), "compressed, whatever its name says"),
    ],
    ids=["empty", "long", "short", "gzip"],
)
def test_what_is_no_tar_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        index_of(tmp_path, content)


def test_an_archive_cut_anywhere_keeps_what_is_before_the_cut(tmp_path: Path) -> None:
    members = [(f"{i}.txt", b"x" * (300 * i)) for i in range(5)]
    content = make_tar(members, tarfile.USTAR_FORMAT)
    whole = index_of(tmp_path, content)
    end = whole[-1].start + 1536  # of the last member with its padding
    for cut in range(512, end + 1, 100):
        *kept, last = index_of(tmp_path, content[:cut])
        assert "the archive is cut off" in last.error
        assert kept == [member for member in whole if member.start + member.size <= cut]
    assert index_of(tmp_path, content[: end + 512]) == whole


def test_a_damaged_header_ends_the_index_with_an_error(tmp_path: Path) -> None:
    content = bytearray(make_tar([(f"{i}.txt", b"x") for i in range(3)]))
    content[1024] ^= 1
    good, bad = index_of(tmp_path, bytes(content))
    assert good.name == "0.txt" and "checksum" in bad.error


def test_what_follows_the_end_is_an_error(tmp_path: Path) -> None:
    one = make_tar([("a.txt", b"x")])
    good, bad = index_of(tmp_path, one + one)
    assert not good.error and "concatenated" in bad.error


@pytest.mark.parametrize(
    "record", [b"x", b"99 path=a\n", b"0 path=a\n", b"12 size=-77\n", b"99999999999 a=b\n"]
)
def test_damaged_extensions_are_errors(record: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    content = info.tobuf() + record.ljust(512, b"\0") + make_tar([("a.txt", b"x")])
    (bad,) = index_of(tmp_path, content)
    assert "damaged header" in bad.error


# --- samples --------------------------------------------------------------------------------------


def read_tar(tmp_path: Path, members: list[tuple[str, bytes]], bad: int = 0) -> list[Any]:
    """The documents of a tar, of which so many samples must be bad."""
    webdataset_source._index.cache_clear()
    (tmp_path / "x.tar").write_bytes(make_tar([*members, ("good.txt", b"good")]))
    source = open_source("webdataset", tmp_path / "x.tar", is_endless=False, bad=1.0)
    (shard,) = source.shards([0], 1)
    documents = list(shard)
    counts = shard.state_dict()["counts"]
    assert counts["bad"] == bad and counts["seen"] == bad + len(documents)
    return documents[:-1]


def shapes(document: Any) -> list[Any]:
    return [s.payload if isinstance(s.payload, str) else s.payload.shape for s in document.segments]


def test_members_of_one_name_make_one_sample(tmp_path: Path) -> None:
    documents = read_tar(
        tmp_path,
        [
            ("d/1.PNG", picture()),
            ("d/1.txt", b"one\n"),
            ("d/2.txt", b"only text\n"),
            ("e/2.caption", b"two"),
            ("e/2.wav", sound(80)),
            ("e/2.cls", b"7"),
            (".hidden.txt", b"x"),
            ("no_suffix", b"x"),
            ("3.json", json.dumps({"caption": ["three"], "text": "no"}).encode()),
            ("3.png", picture()),
            ("4.json", json.dumps({"text": "from json"}).encode()),
            ("5.left.png", picture()),
            ("5.txt", b"five"),
        ],
    )
    found = [sorted(map(str, shapes(document))) for document in documents]
    pixels = str((SIZE, SIZE, 3))
    assert found == [
        [pixels, "one"],
        ["only text\n"],
        ["(80,)", "two"],
        [pixels, "three"],
        ["from json"],
        [pixels, "five"],
    ]
    assert [document.is_pair for document in documents] == [True, False, True, True, False, True]
    assert documents[0].key == f"{tmp_path / 'x.tar'}: d/1"


def test_segments_name_members_of_their_sample(tmp_path: Path) -> None:
    segments = [
        {"text": "a", "loss": False},
        {"image": "0.png"},
        {"image": "7.1.png"},
        {"image": "d/7.0.PNG"},
        {"audio": "wav"},
    ]
    (document,) = read_tar(
        tmp_path,
        [
            ("d/7.json", json.dumps({"segments": segments}).encode()),
            ("d/7.0.png", picture()),
            ("d/7.1.png", picture()),
            ("d/7.wav", sound(80)),
        ],
    )
    pixels = (SIZE, SIZE, 3)
    assert shapes(document) == ["a", pixels, pixels, pixels, (80,)]
    assert not document.segments[0].has_loss


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", picture())], "a pair with no 'caption'"),
        ([("1.png", b""), ("1.txt", b"x")], "the file is empty"),
        ([("1.txt", b"\xff\xfe")], "not UTF-8"),
        ([("1.txt", b"")], "the text is empty"),
        ([("1.json", b"{")], "not JSON"),
        ([("1.json", b"[]")], "its .json is no object"),
        ([("1.png", picture()), ("1.jpg", picture()), ("1.txt", b"x")], "has jpg and png"),
        ([("1.0.png", picture()), ("1.1.png", picture()), ("1.txt", b"x")], "0.png and 1.png"),
        ([("1.txt", b"x"), ("1.txt", b"y")], "has two members 'txt'"),
        ([("1.json", b'{"segments": [{"image": "2.png"}]}')], "2.png is no member of 1"),
        ([("../1.png", picture()), ("../1.txt", b"x")], "leads out of the archive"),
    ],
)
def test_bad_samples_are_counted(
    members: list[tuple[str, bytes]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(
        "torchtitan_mixtures.data.samples.logger.warning", lambda text: reasons.append(text)
    )
    assert not read_tar(tmp_path, members, bad=1)
    assert message in reasons[0]


def test_nothing_is_written_and_nothing_opened_at_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([("1.txt", b"one")]))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args: pytest.fail("opened"))
        source = open_source("webdataset", tmp_path, is_endless=False)
    assert [text_of(document) for document in read_once(source)] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_an_empty_tar_among_others_is_one_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(make_tar([("1.txt", b"one")]))
    source = open_source("webdataset", tmp_path, is_endless=False, bad=0.5)
    (shard,) = source.shards([0], 1)
    assert len(list(shard)) == 1
    assert shard.state_dict()["counts"]["bad"] == 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize("members", [[], [("no_suffix", b"x")]])
def test_tars_without_samples_end_the_run(members: list[Any], tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    (shard,) = open_source("webdataset", tmp_path, bad=1.0).shards([0], 1)
    with pytest.raises(ValueError, match=r"has no samples: no members of names such as 0001"):
        next(iter(shard))
