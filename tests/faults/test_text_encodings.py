"""Files that other programs wrote: odd line ends inside strings, byte order marks, other encodings, binaries."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from adaskip.errors import DataError
from adaskip.lines import own_lines
from adaskip.training.data import load_records, read_prompts
from adaskip.training.tracking import truncate_lines

ROW = {"prompt": "w1 w2", "answer": "w3"}
LINE = json.dumps(ROW)


def write(folder: Path, content: bytes | str) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path) -> list:
    return load_records(str(folder), "train", None, 0)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e"], ids=ascii)
def test_a_string_may_hold_what_unicode_calls_a_line_end(tmp_path: Path, odd: str) -> None:
    """Text copied from a web page holds U+2028; splitting there cuts the JSON in two."""
    text = f"w1{odd}w2"
    escaped = ord(odd) < 32  # control characters must be escaped in JSON, the others need not
    path = write(tmp_path, json.dumps({**ROW, "answer": text}, ensure_ascii=escaped) + "\n" + LINE)
    assert [record["answer"] for record in read(tmp_path)] == [text, "w3"]
    assert read_prompts(path)[0]["answer"] == text


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + f"{LINE}\n{LINE}\n".encode(),
    f"{LINE}\r\n{LINE}\r\n",
    f"{LINE}\r{LINE}",
    f"\n\n{LINE}\n   \n{LINE}",
    f"{LINE}\n{LINE}\n\n\n",
    gzip.compress(f"{LINE}\n{LINE}\n".encode()),
], ids=["byte order mark", "windows", "old mac", "blank lines", "no end", "gzip"])  # fmt: skip
def test_what_editors_do_to_a_file_is_read(tmp_path: Path, content: bytes | str) -> None:
    """Notepad writes a byte order mark and CRLF; neither is part of the data."""
    path = write(tmp_path, content)
    assert read(tmp_path) == [ROW, ROW]
    assert read_prompts(path) == [ROW, ROW]


@pytest.mark.parametrize(("content", "message"), [
    (f"{LINE}\n".encode("utf-16"), "train.jsonl: is UTF-16; expected UTF-8. .* save as UTF-8"),
    (f"{LINE}\n".encode("utf-32"), "train.jsonl: is UTF-32; expected UTF-8"),
    (f"{LINE}\n".encode("utf-16-le"), "train.jsonl: holds zero bytes, so it is binary, or UTF-16; .* save as UTF-8"),
    (f'{LINE}\n{{"prompt": "caf\u00e9"}}'.encode("cp1252"), "line 2: byte 0xe9 after .* save as UTF-8"),
    (LINE.encode() + b"\n\x80abc", "train.jsonl, line 2: byte 0x80"),
    (gzip.compress(LINE.encode() * 99)[:-30], r"train.jsonl: cannot be unpacked .*; copy the file anew"),
    (gzip.compress(f"{LINE}\n".encode("utf-16")), "train.jsonl: is UTF-16; expected UTF-8"),
    (b"PK\x03\x04rest", r"train.jsonl: is compressed \(zip\)"),
    (b"PAR1\x15\x00\x15", "train.jsonl: holds zero bytes, so it is binary"),
    (b"", "train.jsonl: the file is empty"),
    (b"\n \n", "train.jsonl: the file is empty"),
    (f"[{LINE},\n{LINE}]", r"line 1: not JSON .* a JSON document over several lines is not read"),
    ("1" * 5000, "train.jsonl, line 1: not JSON"),
    ("[" * 100_000, "train.jsonl, line 1: not JSON"),
], ids=["utf-16", "utf-32", "utf-16 unmarked", "cp1252", "stray byte", "cut gzip", "gzipped utf-16", "zip", "parquet", "empty", "blank", "array", "digits", "deep"])  # fmt: skip # noqa: E501
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path: Path, content: bytes | str, message: str) -> None:
    """A file in another encoding, packed or binary ends in an error that names it, for data and prompts alike."""
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_a_folder_instead_of_a_file_of_prompts(tmp_path: Path) -> None:
    """`generate --many FOLDER` is a plain error, not IsADirectoryError."""
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path)


def test_a_run_reads_back_what_it_wrote(tmp_path: Path) -> None:
    """A kind of question in a run's own lines may hold U+2028 as well; resuming must not lose that line."""
    path = tmp_path / "conditions.jsonl"
    path.write_text('{"step": 1, "kind": "a\u2028b"}\n{"step": 3}\n{"st', encoding="utf-8")
    truncate_lines(path, 2)
    assert path.read_text(encoding="utf-8") == '{"step": 1, "kind": "a\u2028b"}\n'
    assert own_lines("a\r\nb\n") == ["a", "b"]
    assert own_lines("") == []
