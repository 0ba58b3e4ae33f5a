"""Where the members of an uncompressed tar are, read from its headers alone.

The formats are those of POSIX (ustar, pax) and GNU. `tarfile` of the standard library is not used
since it takes a damaged header for the end, and can be made to loop for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 20  # of a header's extension
_MAX_PADDING = 1 << 20  # bytes after the end that are looked at
_ZEROS = bytes(_BLOCK)

_FILES = (b"0", b"\0", b"7")  # types of members with content
_FOLDER = b"5"
_PAX, _LONG_NAME = b"x", b"L"
_EXTENSIONS = (b"g", b"K", _PAX, _LONG_NAME)  # that say something of what follows
_OTHER = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")


@dataclass(frozen=True)
class Member:
    """A member of an archive.

    Attributes:
        name: In the archive.
        start: Of its content, in bytes from the beginning of the archive.
        size: Bytes of its content.
        error: Why it is not to be read; empty if nothing is wrong.
    """

    name: str
    start: int
    size: int
    error: str = ""


@dataclass
class _Extension:
    """What pax or GNU headers say of the member that follows."""

    name: bytes | None = None
    size: int | None = None
    error: str = ""


def read_index(path: Path) -> list[Member]:
    """Read the headers of an archive.

    Args:
        path: Of a `.tar`.

    Returns:
        Its members in their order, without folders. The last may be one with an error, behind which
        nothing can be read: a member that is cut off, or a header that is damaged.

    Raises:
        ValueError: It is no tar.
        OSError: It cannot be opened.
    """
    with path.open("rb") as stream:
        return list(_members(stream, path.stat().st_size))


def _members(stream: BinaryIO, size: int) -> Iterator[Member]:
    position = 0
    extension = _Extension()
    while True:
        stream.seek(position)
        header = stream.read(_BLOCK)
        if header == _ZEROS:
            yield from _check_end(stream, position)
            return
        if position == 0:
            _check_beginning(header)
        try:
            kind, name, length = _parse(header, extension)
            start = position + _BLOCK
            position = start + -(-length // _BLOCK) * _BLOCK
            if kind in _EXTENSIONS:
                _extend(extension, kind, stream, length)
                continue
        except ValueError as error:
            yield Member(f"byte {position}", position, 0, str(error))
            return
        if start + length > size:
            reason = f"the archive is cut off: {name} would end at byte {start + length} of {size}"
            yield Member(name, start, 0, reason)
            return
        if kind != _FOLDER:
            yield Member(name, start, length, extension.error or _what_is_wrong(kind, name))
        extension = _Extension()


def _check_beginning(header: bytes) -> None:
    if len(header) == _BLOCK and _checksum(header) == _stored_checksum(header):
        return
    if not header:
        raise ValueError("the file is empty; copy it again")
    packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")
    if header.startswith(packed):
        raise ValueError("compressed, whatever its name says; decompress it")
    raise ValueError("not a tar: its first header is damaged")


def _check_end(stream: BinaryIO, position: int) -> Iterator[Member]:
    """An error if anything follows the mark of the end, as in archives that were concatenated."""
    while padding := stream.read(1 << 16):
        if padding.strip(b"\0"):
            reason = "more follows its end; concatenated archives must be made again as one"
            yield Member(f"byte {position}", position, 0, reason)
            return
        if stream.tell() - position > _MAX_PADDING:
            return


def _parse(header: bytes, extension: _Extension) -> tuple[bytes, str, int]:
    """Type, name and size of a member.

    Raises:
        ValueError: The header is cut off or damaged.
    """
    if len(header) < _BLOCK:
        raise ValueError("the archive is cut off: it has no mark of its end")
    if _checksum(header) != _stored_checksum(header):
        raise ValueError("damaged header: its checksum is wrong")
    kind = header[156:157]
    is_extension = kind in _EXTENSIONS
    size = _number(header[124:136])
    if not is_extension and extension.size is not None:
        size = extension.size
    if kind not in (*_FILES, *_OTHER, _FOLDER, *_EXTENSIONS):
        extension.error = extension.error or f"of the type {kind!r}, which is not read"
    if kind in _OTHER or kind == _FOLDER:
        size = 0
    name = _until_null(header[:100])
    if header[257:263] == b"ustar\0" and (prefix := _until_null(header[345:500])):
        name = prefix + b"/" + name
    if not is_extension and extension.name is not None:
        name = extension.name
    return kind, name.decode("utf-8", "surrogateescape"), size


def _extend(extension: _Extension, kind: bytes, stream: BinaryIO, length: int) -> None:
    """Note what a header in front of a member's own says of it.

    Raises:
        ValueError: It is cut off, or not of the form.
    """
    if length > _MAX_NAME_BYTES:
        raise ValueError(f"damaged header: an extension of {length} bytes")
    content = stream.read(length)
    if len(content) < length:
        raise ValueError("the archive is cut off in a header")
    if kind == _LONG_NAME:
        extension.name = _until_null(content)
    if kind != _PAX:
        return  # long targets of links, and what holds for all members, such as comments
    while content:
        record = _PAX_RECORD.match(content)
        end = int(record[1]) if record and len(record[1]) < 8 else 0
        if not record or not record.end() < end <= len(content):
            raise ValueError("damaged header: not of the form of pax")
        name, value = record[2], content[record.end() : end - 1]
        if name == b"path":
            extension.name = value
        elif name == b"size":
            if not value.isdigit() or len(value) > 18:
                raise ValueError("damaged header: the size is no number")
            extension.size = int(value)
        elif name.startswith(b"GNU.sparse"):
            extension.error = "a sparse file, which is not read"
        content = content[end:]


def _what_is_wrong(kind: bytes, name: str) -> str:
    if kind in _OTHER:
        return f"{name} is {_OTHER[kind]}, which is not read"
    if name.startswith("/") or ".." in name.split("/"):
        return f"the name {name!r} leads out of the archive"
    return ""


def _until_null(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _number(field: bytes) -> int:
    """A number in octal digits, or in base 256 if the first bit is set.

    Raises:
        ValueError: It is neither, or negative.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = _until_null(field).strip()
    if field[0] & 0x80 or not re.fullmatch(rb"[0-7]*", text):
        raise ValueError("damaged header: the size is no number")
    return int(text or b"0", 8)


def _stored_checksum(header: bytes) -> int:
    try:
        return _number(header[148:156])
    except ValueError:
        return -1


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")
