"""Bytes of files: unpacked, and as text of a known encoding."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from contextlib import suppress
from pathlib import Path

from hosfl_lightning.data.rows import EmptyError

_MARKS = {  # the longer one first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def check_encoding(encoding: str) -> None:
    """Refuse the name of no text encoding.

    Raises:
        ValueError: It is none.
    """
    try:
        with suppress(UnicodeError):  # as two letters these may be no text of it
            b"ab".decode(encoding)
    except LookupError as error:
        raise ValueError(f"encoding={encoding!r}: unknown; give one such as utf-8, utf-16 or cp1252") from error


def read_bytes(path: str, setting: str) -> bytes:
    """The whole content of a file, unpacked if its name ends in .gz; `setting` is the argument that names it.

    Raises:
        FileNotFoundError: If the path is not a file.
        ValueError: If a .gz file is damaged or cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{setting}: there is no file {path!r}")
    content = Path(path).read_bytes()
    try:
        return gzip.decompress(content) if path.lower().endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{setting}: {path!r} is not a whole gzip file ({error})") from error


def read_text(path: str, setting: str, encoding: str = "utf-8") -> str:
    """The whole file as text, line ends as they are, without a byte order mark.

    With a mark of UTF-16 or UTF-32, which no UTF-8 file begins with, the file is read as that.

    Raises:
        FileNotFoundError: If the path is not a file.
        EmptyError: If it is empty.
        ValueError: If it is not of that encoding, or holds NUL; the message names the line.
    """
    content = read_bytes(path, setting)
    if codecs.lookup(encoding).name == "utf-8":
        encoding = next((other for mark, other in _MARKS.items() if content.startswith(mark)), encoding)
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = _line(content[: error.start].decode(encoding, errors="ignore"))
        raise ValueError(
            f"{setting}: {path!r} line {line} is not {encoding} text (byte {error.start} is "
            f"0x{content[error.start]:02x}); {_advice(content, encoding)}"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{setting}: {path!r} line {_line(text[: text.index(chr(0))])} holds a NUL byte, so it is not {encoding} "
            f"text; {_advice(content, encoding)}, or remove the byte"
        )
    if not text.strip():
        raise EmptyError(f"{setting}: {path!r} is empty")
    return text


def _line(before: str) -> int:
    return 1 + len(re.findall(r"\r\n|\r|\n", before))


def _advice(content: bytes, failed: str) -> str:
    """Another encoding than the one that failed; UTF-16 without a mark has NUL as every other byte of plain letters."""
    even, odd = content[::2].count(0), content[1::2].count(0)
    wide = 4 * max(even, odd) >= len(content) // 2
    likely = ["utf-16-be" if even > odd else "utf-16-le"] if wide else ["utf-8", "cp1252", "latin-1"]
    others = [one for one in likely if codecs.lookup(one).name != codecs.lookup(failed).name and _is(content, one)]
    if not others:
        return "it may be damaged, or of a rarer encoding, which encoding names"
    return f"set encoding: {others[0]}" if wide or others[0] == "utf-8" else f"set encoding, such as {others[0]}"


def _is(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
