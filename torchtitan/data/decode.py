"""Bytes of a file as a reader wants them: decompressed, and in UTF-8.

The content says how a file is compressed, as names are often wrong. Everything is decompressed and
decoded in small parts: memory stays bounded whatever a file expands to. No torch.
"""

import bz2
import codecs
import errno
import io
import lzma
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from torchtitan.config import DataError

DAMAGED_FILE = "the compressed file is damaged"
"""Begins the flaw of a row that stands for the damaged rest of a file."""
WRONG_ENCODING = "the file is not"
"""Begins the flaw of a row that stands for the rest of a file in another encoding."""
_MAGIC = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"
    rb"|(?P<xz>\xfd7zXZ\0)|(?P<bz2>BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90))"
)
MAGIC_BYTES = 16
"""Bytes from the beginning of a file that `compression_of` and `encoding_of` look at."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark its own begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_FILES = (
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"\x89HDF", "HDF5"),
    (b"SQLite format 3", "an SQLite database"),
)
_BLANKS = str.maketrans("\r\n\t", "   ")
_GUESSED_BYTES = 4096
_OUTPUT_BYTES = 1 << 16
_ZSTD_INPUT_BYTES = 1 << 9
"""A block of zeros compresses 32,000-fold, so this can become 16 MiB."""
_ZSTD_HEADER_BYTES = 18
_USUAL_WINDOW = 2**27
"""The largest zstd window without `--long=28` or more, which every decoder allows."""


_TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ESHUTDOWN,  # Lustre, while a server is replaced
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}
"""Errors of a disk or a network that may have passed in a moment."""
_LOST_BODIES = {
    "ReadError",  # httpx; libraries try again what fails before, as a connection or a status
    "ReadTimeout",
    "RemoteProtocolError",
    "ChunkedEncodingError",  # requests
    "ClientPayloadError",  # aiohttp
    "IncompleteRead",
}
"""Names of errors of HTTP libraries that break off an answer."""
_HTTP_LIBRARIES = ("aiohttp", "http", "requests", "urllib3")
"""Beginnings of their modules; `tarfile` has a `ReadError`, too."""


def transient_cause(error: BaseException) -> BaseException | None:
    """Return the error that may have passed in a moment: `error`, or a cause of it; else None."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _TRANSIENT:
            return link
        if str(link) == "Server Disconnected":
            return None  # from `datasets`, which has tried for minutes
        kind = type(link)
        is_lost = kind.__name__ in _LOST_BODIES and kind.__module__.startswith(_HTTP_LIBRARIES)
        if is_lost or isinstance(link, ConnectionError | TimeoutError):
            return link
        link = link.__cause__
    return None


def compression_of(start: bytes) -> str | None:
    """Return `gzip`, `zstd`, `bz2` or `xz` by the first bytes of a file, None for anything else."""
    found = _MAGIC.match(start)
    return None if found is None else found.lastgroup


def looks_like_text(start: bytes) -> bool:
    """Return whether the first bytes of a file can only be text, whatever its suffix says."""
    try:  # the last character may be cut off
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return False
    return text.translate(_BLANKS).isprintable()


def encoding_of(start: bytes) -> str | None:
    """Return the codec that a byte-order mark at the beginning of a file stands for."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), None)


def decompressed(file: BinaryIO, compression: str | None, max_window_bytes: int) -> BinaryIO:
    """Return the content of `file`, which is closed with it.

    Reading raises the errors that `corruption` explains, and DataError if zstd windows above
    128 MiB would take more than `max_window_bytes` in this process.
    """
    if compression is None:
        return file
    if compression == "zstd":
        return _stream(_zstd(file, max_window_bytes), file)
    makers: dict[str, Callable[[], Any]] = {
        "gzip": lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS + 16),
        "bz2": bz2.BZ2Decompressor,
        "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    }
    return _stream(_members(file, makers[compression]), file)


def transcoded(stream: BinaryIO, encoding: str) -> BinaryIO:
    """Return the text of `stream` as UTF-8 without a byte-order mark.

    Reading raises the errors that `corruption` explains.
    """
    return _stream(_utf8(stream, encoding), stream)


def corruption(error: Exception) -> str | None:
    """Say what is wrong with the content of a file that raised `error`; None for other errors."""
    if transient_cause(error) is not None:
        return None
    if isinstance(error, EOFError | zlib.error | lzma.LZMAError):
        return f"{DAMAGED_FILE} or cut short ({error})"
    if type(error).__name__ == "ZstdError" or (isinstance(error, OSError) and error.errno is None):
        return f"{DAMAGED_FILE} ({error})"
    source = "its byte-order mark or data.encoding says"
    if isinstance(error, UnicodeDecodeError):
        return f"{WRONG_ENCODING} {error.encoding}, as {source}: {error.reason}"
    if isinstance(error, UnicodeError):  # of codecs that expect a byte-order mark
        fix = 'name its byte order in data.encoding, such as "utf-16-le" or "utf-16-be"'
        return f"{WRONG_ENCODING} as {source}: {error}; {fix}"
    return None


class _Chunks(io.RawIOBase):
    """A raw stream of the bytes that an iterator gives."""

    def __init__(self, chunks: Iterator[bytes], file: BinaryIO):
        self._chunks = chunks
        self._file = file
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._chunks.close()  # type: ignore[attr-defined]
            self._file.close()
        super().close()


def _stream(chunks: Iterator[bytes], file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Chunks(chunks, file), buffer_size=_OUTPUT_BYTES)


def _members(file: BinaryIO, new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress one member after another.

    The standard library's readers drop anything after a member that is not one, and with it the
    rest of a damaged file.
    """
    rest = file.read(_OUTPUT_BYTES)
    while rest:
        decoder = new_decoder()
        while not decoder.eof:
            if not rest and getattr(decoder, "needs_input", True):
                rest = file.read(_OUTPUT_BYTES)
                if not rest:
                    raise EOFError("the file ends in the middle of the compressed data")
            yield decoder.decompress(rest, _OUTPUT_BYTES)
            # zlib gives back what it has not used, other decoders keep it.
            rest = getattr(decoder, "unconsumed_tail", b"")
        rest = decoder.unused_data or file.read(_OUTPUT_BYTES)
        while rest and not rest.strip(b"\0"):  # padding, as tapes and `xz` make it
            rest = file.read(_OUTPUT_BYTES)
        rest = rest.lstrip(b"\0")


def _zstd(file: BinaryIO, max_window_bytes: int) -> Iterator[bytes]:
    """Decompress zstd frames.

    The library's own reader takes the end of the file for the end of the data, and reads no
    window above 128 MiB.
    """
    import zstandard

    rest, padding = b"", b""
    while True:
        while len(rest) < _ZSTD_HEADER_BYTES and (part := file.read(_ZSTD_INPUT_BYTES)):
            rest = (rest + part).lstrip(padding)
        if not rest:
            return
        window = zstandard.get_frame_parameters(rest).window_size
        with _WINDOWS.held(window, max_window_bytes):
            largest = max(window, _USUAL_WINDOW)
            decoder = zstandard.ZstdDecompressor(max_window_size=largest).decompressobj()
            while not decoder.eof:
                part = rest or file.read(_ZSTD_INPUT_BYTES)
                if not part:
                    raise EOFError("the file ends in the middle of a zstd frame")
                rest = b""
                yield decoder.decompress(part)
            padding = b"\0"  # between frames and after them, as other formats have it
            rest = decoder.unused_data.lstrip(padding)


class _Windows:
    """The memory that this process holds for zstd windows of unusual size."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0

    @contextmanager
    def held(self, window: int, limit: int) -> Iterator[None]:
        """Count `window` bytes while they are in use. Raises DataError above `limit` in all."""
        window = window if window > _USUAL_WINDOW else 0
        with self._lock:
            if window and self._held + window > limit:
                raise DataError(
                    f"a zstd frame needs a window of {window >> 20} MiB (`zstd --long`), and all"
                    f" such windows of this process {(self._held + window) >> 20} MiB, more than"
                    f" data.max_zstd_window_mib = {limit >> 20}: raise that, set a smaller"
                    " data.lanes (each lane holds a window), or compress the file without `--long`"
                )
            self._held += window
        try:
            yield
        finally:
            with self._lock:
                self._held -= window


_WINDOWS = _Windows()


def _utf8(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    while part := stream.read(_OUTPUT_BYTES):
        yield decoder.decode(part).encode("utf-8")
    yield decoder.decode(b"", True).encode("utf-8")


def guess_format(content: bytes) -> str | None:
    """Say what the first bytes of a file seem to be, if that is a known kind that holds no text."""
    for magic, name in _OTHER_FILES:
        if content.startswith(magic):
            return f"it seems to be {name}"
    if content[257:262] == b"ustar":
        return "it seems to be a tar archive"
    compression = compression_of(content)
    return None if compression is None else f"it seems to be compressed twice (here {compression})"


def guess_content(content: bytes) -> str:
    """Say what bytes that are not UTF-8 seem to be, and what to do about that."""
    if (other := guess_format(content)) is not None:
        return other
    # Text in UTF-16 has a 0 in every second byte where it is ASCII, as its blanks and digits are.
    zeros = [content[start::4].count(0) * 8 > len(content) // 4 for start in range(4)]
    wide = {
        (False, True, False, True): "utf-16-le",
        (True, False, True, False): "utf-16-be",
        (False, True, True, True): "utf-32-le",
        (True, True, True, False): "utf-32-be",
    }.get((zeros[0], zeros[1], zeros[2], zeros[3]))
    if wide is not None:
        return f'it seems to be {wide.upper()[:-3]}: set data.encoding = "{wide}"'
    controls = sum(content.count(byte) for byte in range(32) if byte not in b"\t\n\f\r\x1b")
    if controls * 100 > len(content):
        return "it seems to be binary, and no text"
    high = sum(byte >= 0x80 for byte in content[:_GUESSED_BYTES])
    if high * 3 < min(len(content), _GUESSED_BYTES):
        return (
            'it seems to be Latin-1 or Windows-1252: set data.encoding = "latin-1" or "cp1252",'
            " whichever it is"
        )
    return "it seems to be text in an encoding of another alphabet: name it as data.encoding"
