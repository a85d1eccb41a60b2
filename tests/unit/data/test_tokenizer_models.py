"""`tokenizer.model` files: real ones, made with tiktoken and sentencepiece themselves."""

import base64
import io
import itertools
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiktoken._educational import bpe_train

from torchtitan.config import ConfigError
from torchtitan.data import tokenizers
from torchtitan.data.tiktoken_model import PATTERN, parts_of, special_tokens
from torchtitan.data.tokenizers import build_tokenizer

ASSETS = Path(__file__).parents[2] / "assets"
SCRIPTS = {
    "latin": "Žluťoučký kůň, naïve café:\n\tit's 12345.67 — don’t!",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों का राजा।",
    "chinese": "天地玄黃,宇宙洪荒。日月盈昃\u3000辰宿列張",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 🙂  \r\n\r\n   end ",
}
TRAINING = Path(__file__).read_text("utf-8")


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    return b"".join(lines)


def sentencepiece_file(**options) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=filter(str.isascii, TRAINING.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return bpe_train(TRAINING[:3000], 300, PATTERN, visualise=None)


@pytest.fixture(scope="module")
def llama2_file() -> bytes:
    return sentencepiece_file()


@pytest.fixture(params=["bytes", "json", "tiktoken", "sentencepiece"])
def tokenizer(request, tmp_path, ranks, llama2_file):
    """One of each kind, and a copy as a worker process would have it."""
    paths = {"bytes": "bytes", "json": ASSETS / "tokenizer"}
    contents = {"tiktoken": tiktoken_file(ranks), "sentencepiece": llama2_file}
    if request.param in contents:
        paths[request.param] = tmp_path / "tokenizer.model"
        paths[request.param].write_bytes(contents[request.param])
    return build_tokenizer(str(paths[request.param]))


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_text_in_any_script_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.decode(ids) == text
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.encode(text, bos=False, eos=False) == ids[1:-1]
    assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    array = copy.encode_array(text, bos=True, eos=True)
    assert array.dtype == np.int32 and array.tolist() == ids
    assert (copy.fingerprint, copy.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)


def test_documents_cannot_forge_special_tokens(tokenizer):
    for name in ("<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "</s>", "<s>", "<unk>"):
        text = f"a{name}b"
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert len(ids) > 3


def test_half_characters_are_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("é\ud83dz", bos=False, eos=False)) == "é?z"


def test_nothing_to_encode_and_ids_of_padding(tokenizer):
    assert tokenizer.encode("", bos=False, eos=False) == []
    assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.bos_id, tokenizer.eos_id]
    ids = tokenizer.encode("ab", bos=False, eos=True)
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "ab"


@pytest.mark.parametrize("run", ["a", " ", "学"])
def test_long_runs(tokenizer, run):
    text = run * 300_000
    ids = tokenizer.encode_array(text, bos=False, eos=False)
    assert tokenizer.decode(ids.tolist()) == text


def test_a_run_on_which_tiktoken_itself_fails(ranks, tmp_path):
    blanks = " " * 1_200_000
    library = tiktoken.Encoding("mine", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(BaseException, match="StackOverflow"):
        library.encode_ordinary(blanks)
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_file(ranks))
    tokenizer = build_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode(blanks, bos=False, eos=False)) == blanks


def test_tiktoken_gives_the_ids_of_the_library(tmp_path, ranks):
    file = tmp_path / "any.name"
    file.write_bytes(tiktoken_file(ranks))
    tokenizer = build_tokenizer(str(file))
    library = tiktoken.Encoding("mine", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    text = TRAINING + "".join(SCRIPTS.values())
    assert tokenizer.encode(text, bos=False, eos=False) == library.encode_ordinary(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (300, 301, 304)
    assert tokenizer.vocab_size == 300 + 256


def test_the_special_tokens_of_llama_3():
    names = special_tokens()
    assert len(set(names)) == len(names) == 256
    ids = {name: 128_000 + number for number, name in enumerate(names)}
    assert ids["<|begin_of_text|>"] == 128_000 and ids["<|end_of_text|>"] == 128_001
    assert ids["<|start_header_id|>"] == 128_006 and ids["<|end_header_id|>"] == 128_007
    assert ids["<|eom_id|>"] == 128_008 and ids["<|eot_id|>"] == 128_009
    assert ids["<|python_tag|>"] == 128_010
    assert ids["<|reserved_special_token_247|>"] == 128_255


def places_of_cuts(text: str) -> list[int]:
    """Where `parts_of` is to cut, found slowly: before a run's character 25,001, 50,001, ..."""
    cuts, length = [], 0
    blank = [character.isspace() for character in text]
    for place in range(1, len(text)):
        length += 1
        if place % 400_000 == 0:
            cuts.append(place)
            length = 0
        elif blank[place] != blank[place - 1]:
            length = 0
        elif length == 25_000:
            cuts.append(place)
            length = 0
    return cuts


def test_long_runs_are_cut_as_by_meta():
    dice = random.Random(0)
    lengths = [25_000, 25_001, 3, 60_000, 1, 50_000, 24_999, 120_000, 7, 200_000]
    kinds = ["x学", " \n\t", "ab"]
    text = "".join(
        "".join(dice.choices(kinds[place % 2], k=length)) for place, length in enumerate(lengths)
    )
    assert len(text) > 400_000
    parts = list(parts_of(text))
    assert "".join(parts) == text
    assert list(itertools.accumulate(map(len, parts)))[:-1] == places_of_cuts(text)
    words = "a word " * 20_000
    assert list(parts_of(words)) == [words]


def test_both_test_assets_give_the_same_ids():
    one, other = (
        build_tokenizer(str(ASSETS / "test_tiktoken.model")),
        build_tokenizer(str(ASSETS / "tokenizer")),
    )
    text = TRAINING + "".join(SCRIPTS.values())
    assert one.encode(text, True, True) == other.encode(text, True, True)
    assert len(one.encode(text, True, True)) < len(text.encode()) / 2
    assert (one.bos_id, one.eos_id, one.pad_id) == (other.bos_id, other.eos_id, other.pad_id)


def test_sentencepiece_gives_the_ids_of_the_library(tmp_path, llama2_file):
    file = tmp_path / "any.name"
    file.write_bytes(llama2_file)
    tokenizer = build_tokenizer(str(file))
    library = SentencePieceProcessor(model_proto=llama2_file)
    text = TRAINING + "".join(SCRIPTS.values())
    assert tokenizer.encode(text, bos=True, eos=True) == [1, *library.encode(text), 2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.vocab_size == 400


def test_the_special_tokens_of_sentencepiece_are_those_of_the_model(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_file(bos_id=-1, eos_id=5, pad_id=0, unk_id=3))
    tokenizer = build_tokenizer(str(file))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 5, 0)
    ids = tokenizer.encode("a", bos=True, eos=True)
    assert tokenizer.decode(ids) == "a" and ids[-1] == 5
    file.write_bytes(sentencepiece_file(eos_id=-1))
    assert "without an end-of-text token" in problem_of(file)


def test_the_content_decides_and_not_the_name(tmp_path, ranks, llama2_file):
    kinds = set()
    contents = [tiktoken_file(ranks), llama2_file]
    contents.append((ASSETS / "tokenizer" / "tokenizer.json").read_bytes())
    for content in contents:
        (tmp_path / "tokenizer.model").write_bytes(content)
        kinds.add(build_tokenizer(str(tmp_path)).fingerprint.partition("-")[0])
    assert kinds == {"tiktoken", "sentencepiece", "json"}


def test_where_a_folder_is_searched(tmp_path, ranks, llama2_file):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(tiktoken_file(ranks))
    kind = [build_tokenizer(str(tmp_path)).fingerprint.partition("-")[0]]
    (tmp_path / "tokenizer.model").write_bytes(llama2_file)
    kind.append(build_tokenizer(str(tmp_path)).fingerprint.partition("-")[0])
    (tmp_path / "tokenizer.json").write_bytes(
        (ASSETS / "tokenizer" / "tokenizer.json").read_bytes()
    )
    kind.append(build_tokenizer(str(tmp_path)).fingerprint.partition("-")[0])
    assert kind == ["tiktoken", "sentencepiece", "json"]


def test_another_file_is_another_fingerprint(tmp_path, ranks, llama2_file):
    contents = [tiktoken_file(ranks), tiktoken_file(dict(list(ranks.items())[:-1]))]
    contents += [llama2_file, sentencepiece_file(pad_id=3)]
    fingerprints = set()
    for content in contents:
        (tmp_path / "tokenizer.model").write_bytes(content)
        fingerprints.add(build_tokenizer(str(tmp_path)).fingerprint)
    assert len(fingerprints) == 4


def problem_of(file: Path) -> str:
    with pytest.raises(ConfigError) as error:
        build_tokenizer(str(file))
    (problem,) = error.value.problems
    assert problem.key == "model.tokenizer_path" and str(file) in problem.problem
    return problem.problem


def test_damaged_files(tmp_path, ranks, llama2_file, monkeypatch):  # row 48
    file = tmp_path / "tokenizer.model"
    whole = tiktoken_file(ranks)
    first, rest = whole.split(b"\n", 1)
    without = {rank: token for token, rank in ranks.items() if token != b"A"}
    renumbered = {token: rank for rank, token in enumerate(without.values())}
    damaged = {
        whole[:-5]: "line 300 is not a token in base64 and its rank",
        whole[:-2]: "ranks are not 0, 1, 2",  # 29 of 299
        whole + b"!!!! 300\n": "line 301 is not a token",
        first + b"\n" + whole: "line 2 repeats a token",
        rest.replace(b" 5\n", b" 0\n"): "ranks are not 0, 1, 2",
        tiktoken_file(renumbered): "no token for the byte 0x41",
        llama2_file[: len(llama2_file) // 2]: "sentencepiece cannot read it",
        b"": "empty",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "pointer of Git LFS",
        b"<!doctype html>": "a web page",
        b"PK\x03\x04": "neither a tokenizer.json nor a model of tiktoken or sentencepiece",
    }
    for content, message in damaged.items():
        file.write_bytes(content)
        assert message in problem_of(file)
    file.write_bytes(whole)
    monkeypatch.setattr(tokenizers, "_MOST_BYTES", 100)
    assert "0 MiB large" in problem_of(file)


def test_sentencepiece_with_tokens_that_the_files_beside_it_name(tmp_path):
    content = sentencepiece_file(control_symbols=["<turn>"])
    (tmp_path / "tokenizer.model").write_bytes(content)
    plain = build_tokenizer(str(tmp_path))
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    assert build_tokenizer(str(tmp_path)).fingerprint == plain.fingerprint
    config.write_text('{"eos_token": "<turn>"}')
    named = pickle.loads(pickle.dumps(build_tokenizer(str(tmp_path))))  # noqa: S301
    assert named.token_name(named.eos_id) == "<turn>" and named.bos_id == plain.bos_id
    assert named.fingerprint != plain.fingerprint
    assert named.decode(named.encode("a <turn>", bos=True, eos=True)) == "a <turn>"
    config.write_text('{"eos_token": "<odd>"}')
    with pytest.raises(ConfigError, match=r"no end-of-text token \(`<odd>` is not in its voc"):
        build_tokenizer(str(tmp_path))
