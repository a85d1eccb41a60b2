"""Files in any compression and encoding, under whatever name."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import random

import pytest
import zstandard
from data_runs import Run, make_config, make_documents
from test_bad_data import facts_for, only, read_all
from test_data_order import all_steps, lane_documents

from torchtitan.commands.train import describe_data
from torchtitan.config import DataError
from torchtitan.data import decode
from torchtitan.data.registry import build_source
from torchtitan.preflight.data import check_environment, check_static

DOCUMENTS = make_documents(60)
LINES = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in DOCUMENTS)
COMPRESS = {
    "gz": gzip.compress,
    "gzip": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def read_documents(path, **data):
    """Documents of one lane in the order of the files."""
    config = make_config(str(path), epochs=1, shuffle=False, **data)
    return lane_documents(all_steps(config, num_lanes=1, global_batch=1), 0)


def long_window(content: bytes, log: int) -> bytes:
    """As `zstd --long=LOG` compresses a stream, whose size it does not know."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(content) + stream.flush()


# Compression -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", COMPRESS)
def test_compressed_files(tmp_path, form):
    """In several members, with the suffix, without it, and under a wrong one."""
    content = LINES.encode()
    packed = COMPRESS[form](content[:1000]) + COMPRESS[form](content[1000:])
    for name in (f"a.jsonl.{form}", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(packed)
        assert check_environment(facts_for(tmp_path / name, lanes=1)) == []
        assert read_documents(tmp_path / name) == DOCUMENTS
        (tmp_path / name).unlink()
        # As a browser stores what it was sent in compressed form.
        (tmp_path / f"b.jsonl.{form}").write_bytes(content)
        assert read_documents(tmp_path / f"b.jsonl.{form}") == DOCUMENTS


@pytest.mark.parametrize("start", ["数学数学数学", "\ufeffa", "a\r\nb"])
def test_text_under_the_name_of_a_compressed_file(tmp_path, start):
    (tmp_path / "a.txt.gz").write_bytes(f"{start} and more words".encode())
    expected = f"{start} and more words".removeprefix("\ufeff")
    assert read_documents(tmp_path / "a.txt.gz") == [expected]


def test_what_other_programs_put_between_the_data(tmp_path):
    """Blocks of bgzip, skippable frames of seekable zstd files, padding of tapes and of xz."""
    content = LINES.encode()
    frame = COMPRESS["zst"]
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    packed = {
        "gz": b"".join(gzip.compress(content[n : n + 99]) for n in range(0, len(content), 99)),
        "zst": skipped + frame(content[:50]) + skipped + frame(b"") + bytes(700),
        "xz": lzma.compress(content[:50]) + bytes(8) + lzma.compress(content[50:]) + bytes(4),
    }
    packed["gz"] += gzip.compress(b"") + bytes(512)
    packed["zst"] += frame(content[50:]) + skipped + bytes(5)
    for form, content in packed.items():
        (tmp_path / f"a.jsonl.{form}").write_bytes(content)
        assert read_documents(tmp_path / f"a.jsonl.{form}") == DOCUMENTS


@pytest.mark.parametrize("form", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("damage", ["cut", "rest", "header"])
def test_no_damage_passes_for_the_end_of_a_file(tmp_path, form, damage):
    letters = random.Random(0)
    content = "\n".join(json.dumps({"text": letters.randbytes(99).hex()}) for _ in range(300))
    packed = COMPRESS[form](content.encode())
    broken = {
        "cut": packed[:-1],
        "rest": packed + b"nothing compressed",
        "header": packed + packed[:3],
    }[damage]
    (tmp_path / f"a.jsonl.{form}").write_bytes(broken)
    problem = only(check_environment(facts_for(tmp_path / f"a.jsonl.{form}", lanes=1)))
    assert "the compressed file is damaged" in problem.problem


@pytest.mark.parametrize("log", [28, 31])
def test_long_windows(tmp_path, log):
    (tmp_path / "a.jsonl.zst").write_bytes(long_window(LINES.encode(), log))
    assert check_environment(facts_for(tmp_path / "a.jsonl.zst", lanes=1)) == []
    assert read_documents(tmp_path / "a.jsonl.zst") == DOCUMENTS


def test_long_windows_within_a_limit_for_all_lanes(tmp_path):
    """What is closed counts no longer; usual windows never do."""
    content = f"{LINES}\n".encode() * 50  # more than one block of rows
    (tmp_path / "a.jsonl.zst").write_bytes(long_window(content, 28))
    config = make_config(str(tmp_path), max_zstd_window_mib=300)
    for _ in range(3):
        run = Run(config, num_lanes=1, global_batch=1)
        run.step()
        run.close()
    with pytest.raises(DataError, match=r"a window of 256 MiB .* 512 MiB, more than .* = 300"):
        Run(config, num_lanes=2).step()
    none = facts_for(tmp_path, lanes=1, data__max_zstd_window_mib=0)
    assert "max_zstd_window_mib = 0" in only(check_environment(none)).problem
    (tmp_path / "a.jsonl.zst").write_bytes(long_window(LINES.encode(), 27))
    assert check_environment(none) == []


def test_a_small_file_of_one_huge_row_is_judged_while_it_is_decompressed(tmp_path, monkeypatch):
    stream = zstandard.ZstdCompressor().compressobj()
    parts = [b'{"text": "a"}\n{"text": "', *[b"x" * 2**20] * 200, b'"}\n{"text": "b"}']
    packed = b"".join(map(stream.compress, parts)) + stream.flush()
    assert len(packed) < 10_000
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    num_read = 0

    class Counting(io.BytesIO):
        def read(self, size=-1):
            nonlocal num_read
            num_read += (part := len(content := super().read(size))) or part
            return content

    monkeypatch.setattr(
        "torchtitan.data.files.open", lambda path, mode: Counting(packed), raising=False
    )
    problem = only(check_environment(facts_for(tmp_path, lanes=1, data__max_document_mib=1.0)))
    assert "a.jsonl.zst:2 (byte 14): the row is longer than" in problem.problem
    assert num_read < len(packed) // 2
    skipping = {"data__max_document_mib": 1.0, "data__on_bad_row": "skip"}
    monkeypatch.undo()
    assert check_environment(facts_for(tmp_path, lanes=1, **skipping)) == []
    assert read_documents(tmp_path, max_document_mib=1.0, on_bad_row="skip") == ["a", "b"]


# Encodings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz"])
def test_byte_order_marks(tmp_path, encoding, name):
    text = "\n".join(DOCUMENTS) if name == "a.txt" else LINES
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert check_environment(facts_for(tmp_path / name, lanes=1)) == []
    expected = [text] if name == "a.txt" else DOCUMENTS
    assert read_documents(tmp_path / name) == expected
    line = describe_data(facts_for(tmp_path / name))[0]
    assert (f"{name} is decoded from {encoding.upper()}" in line) == (encoding != "utf-8-sig")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_json_without_a_mark_is_recognised(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(LINES.encode(encoding))
    assert read_documents(tmp_path / "a.jsonl") == DOCUMENTS


WORDS = "Les élèves étaient là, naïfs et déjà fatigués. " * 40
SEEMS = {
    "utf-16-le": ("it seems to be UTF-16", "utf-16-le"),
    "utf-16-be": ("it seems to be UTF-16", "utf-16-be"),
    "utf-32-le": ("it seems to be UTF-32", "utf-32-le"),
    "latin-1": ("it seems to be Latin-1 or Windows-1252", "latin-1"),
    "cp1252": ("it seems to be Latin-1 or Windows-1252", "cp1252"),
    "gb18030": ("an encoding of another alphabet", "gb18030"),
    "koi8-r": ("an encoding of another alphabet", "koi8-r"),
}


@pytest.mark.parametrize("encoding", SEEMS)
def test_text_in_another_encoding_is_refused_and_can_be_named(tmp_path, encoding):
    seems, name = SEEMS[encoding]
    text = {"gb18030": "数学很有意思。", "koi8-r": "Математика интересна. "}.get(encoding, WORDS)
    text *= 20
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    problem = only(check_environment(facts_for(tmp_path / "a.txt", lanes=1)))
    assert problem.problem.startswith(f"{tmp_path}/a.txt:1 (byte 0): not ")
    assert seems in problem.problem and "data.encoding" in problem.problem
    assert problem.fix.startswith("set data.encoding, or ")
    with pytest.raises(DataError, match=seems):
        read_documents(tmp_path / "a.txt")
    assert check_environment(facts_for(tmp_path / "a.txt", lanes=1, data__encoding=name)) == []
    assert read_documents(tmp_path / "a.txt", encoding=name) == [text]
    wrong = facts_for(tmp_path / "a.txt", lanes=1, data__encoding="ascii")
    assert "the file is not ascii" in only(check_environment(wrong)).problem


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_an_encoding_that_needs_a_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(WORDS.encode(f"{encoding}-le"))
    wrong = facts_for(tmp_path / "a.txt", lanes=1, data__encoding=encoding)
    assert (
        "does not start with BOM; name its byte order in" in only(check_environment(wrong)).problem
    )


def test_what_is_no_text(tmp_path):
    contents = {
        "binary": random.Random(0).randbytes(5000),
        "Parquet": b"PAR1" + random.Random(0).randbytes(5000),
        "a zip archive": b"PK\x03\x04" + bytes(500),
        "compressed twice (here gzip)": gzip.compress(gzip.compress(LINES.encode())),
    }
    for name, content in contents.items():
        (tmp_path / "a.txt").write_bytes(content)
        assert (
            f"it seems to be {name}"
            in only(check_environment(facts_for(tmp_path, lanes=1))).problem
        )
        (tmp_path / "a.txt").unlink()
        (tmp_path / "a.jsonl").write_bytes(content)
        assert (
            f"it seems to be {name}"
            in only(check_environment(facts_for(tmp_path, lanes=1))).problem
        )
        (tmp_path / "a.jsonl").unlink()


def test_one_stray_byte_leaves_out_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan.data.sources_text._PIECE_BYTES", 4096)
    text = "".join(f"line {n}\n" for n in range(3000)).encode()
    (tmp_path / "a.txt").write_bytes(text[:9000] + b"\xff" + text[9000:])
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 0xff at 9000\)"):
        read_all(tmp_path / "a.txt")
    targets, last = read_all(tmp_path / "a.txt", on_bad_row="skip")
    assert last.bad_rows == 1 and targets > len(text) - 6200


def test_encoding_and_separator_are_checked():
    for key, value in (
        ("encoding", "utf-99"),
        ("encoding", "zip"),
        ("encoding", "rot13"),
        ("document_separator", ""),
    ):
        context = facts_for(None, training__dataset="stdlib", **{f"data__{key}": value})
        problem = only(check_static(context))
        assert problem.key == f"data.{key}" and problem.value == value


def test_encoding_is_part_of_the_fingerprint(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 9000)
    fingerprints = {
        Run(make_config(str(tmp_path), **options), num_lanes=2).loaders[0].fingerprint
        for options in ({}, {"encoding": "latin-1"}, {"document_separator": "\n"})
    }
    assert len(fingerprints) == 3


def test_each_source_has_its_own_encoding(tmp_path):
    texts = {"utf-8": "naïve " * 2000, "latin-1": "déjà " * 2000}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode(name))
    sources = [
        {"path": str(tmp_path / f"{name}.txt"), "weight": 1, "encoding": name} for name in texts
    ]
    context = facts_for(None, lanes=1, data__sources=sources, training__seq_len=16)
    assert check_environment(context) == []
    del sources[1]["encoding"]
    problem = only(check_environment(facts_for(None, lanes=1, data__sources=sources)))
    assert problem.key == "data.sources[1].path" and "encoding in its table" in problem.fix


def test_a_mark_of_utf_32_is_not_taken_for_one_of_utf_16():
    assert decode.encoding_of(codecs.BOM_UTF32_LE + b"a\0\0\0") == "utf-32"
    assert decode.encoding_of(codecs.BOM_UTF16_LE + b"a\0") == "utf-16"
    assert decode.encoding_of(b"text") is None


def test_a_place_in_a_decoded_file_can_be_seeked_to_by_no_lane(tmp_path):
    """Bytes on the disk are not those of the text: such a file is read from the front."""
    (tmp_path / "a.txt").write_bytes(("words and words\n" * 9000).encode("utf-16"))
    config = make_config(str(tmp_path))
    shards = build_source(config.training, config.data).shards(4)
    assert {shard.end for shard in shards} == {None} and len(shards) >= 4
