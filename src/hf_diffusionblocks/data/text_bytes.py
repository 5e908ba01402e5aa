"""From the bytes of a text file to text: UTF-8, and what to do about a file that is not."""

import codecs
import os
from pathlib import Path

_MARKS = (  # the longer first: UTF-16's mark begins UTF-32's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(file: str | os.PathLike) -> str:
    """The text of a UTF-8 file, without a byte order mark and with line ends as ``"\\n"``.

    Raises:
        ValueError: if it cannot be read, is no text (it holds a byte 0) or is not UTF-8, naming the first such byte.
    """
    try:
        data = Path(file).read_bytes()
        _check_encoding(file, data[:4])
        _check_zeros(file, data, 0)
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(file, error, error.start)) from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def check_utf8(file: str | os.PathLike) -> None:
    """Read through a file of any size; ValueError naming the first byte that is not UTF-8, or is 0."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with open(file, "rb") as stream:
        while True:
            chunk = stream.read(1 << 20)
            if not before:
                _check_encoding(file, chunk[:4])
            _check_zeros(file, chunk, before)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # What is decoded starts with bytes of the chunk before.
                position = before - (len(error.object) - len(chunk)) + error.start
                raise ValueError(_not_utf8(file, error, position)) from error
            if not chunk:
                return
            before += len(chunk)


def _check_encoding(file: str | os.PathLike, begin: bytes) -> None:
    for mark, name in _MARKS:
        if begin.startswith(mark):
            raise ValueError(
                f"{file} is not UTF-8: its byte order mark, 0x{mark.hex()}, is that of {name.upper()}. Convert it "
                f"with `iconv -f {name} -t utf-8`."
            )


def _check_zeros(file: str | os.PathLike, data: bytes, before: int) -> None:
    if (place := data.find(0)) >= 0:
        raise ValueError(
            f"{file} is no text: the byte at position {before + place} is 0, as in binary files (and in UTF-16 without "
            "a byte order mark: convert that with `iconv -f utf-16le -t utf-8`). Give text in UTF-8."
        )


def _not_utf8(file: str | os.PathLike, error: UnicodeDecodeError, position: int) -> str:
    return (
        f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at position {position} ({error.reason}). "
        "Convert it, for example with `iconv -f latin1 -t utf-8`."
    )
