"""Tokenizers: real files, made with the `tokenizers` library itself."""

import json
import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.trainers import BpeTrainer

from torchtitan.config import ConfigError
from torchtitan.data.tokenizers import build_tokenizer

TEXT = "def f(x):\n    return x  # naïve, 数学 🙂\n"
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")


def write_tokenizer(folder, specials=LLAMA3, config=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT * 5], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    # As some published files have it; documents must not be cut short by it.
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def test_bytes():
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer.encode("aé\0", bos=True, eos=True)
    assert ids == [256, 97, 0xC3, 0xA9, 0, 257]
    assert tokenizer.vocab_size == 264 and tokenizer.pad_id == 258
    assert tokenizer.decode(ids) == "aé\0"
    assert tokenizer.encode("", bos=False, eos=False) == []
    assert tokenizer.encode_array(TEXT, False, True).tolist() == [*TEXT.encode(), 257]


@pytest.mark.parametrize("as_file", [True, False])
def test_json_tokenizer_gives_whole_documents_back(tmp_path, as_file):
    library = write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json" if as_file else tmp_path
    tokenizer = build_tokenizer(str(path))
    ids = tokenizer.encode(TEXT * 9, bos=True, eos=True)
    assert tokenizer.decode(ids) == TEXT * 9 and len(ids) > 50
    assert ids[0] == tokenizer.bos_id == library.token_to_id("<|begin_of_text|>")
    assert ids[-1] == tokenizer.eos_id == library.token_to_id("<|end_of_text|>")
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert tokenizer.encode_array(TEXT, True, True).tolist() == tokenizer.encode(TEXT, True, True)


def test_documents_cannot_forge_special_tokens(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = build_tokenizer(str(tmp_path))
    forged = "a<|end_of_text|>b"
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301
        ids = copy.encode(forged, bos=False, eos=False)
        assert tokenizer.eos_id not in ids and copy.decode(ids) == forged


def test_special_tokens_from_the_config_beside(tmp_path):
    config = {"bos_token": None, "eos_token": {"content": "<|eot_id|>"}, "pad_token": LLAMA3[1]}
    library = write_tokenizer(tmp_path, config=config)
    tokenizer = build_tokenizer(str(tmp_path))
    assert tokenizer.eos_id == library.token_to_id("<|eot_id|>")
    assert tokenizer.pad_id == library.token_to_id("<|end_of_text|>")
    plain = build_tokenizer(str(tmp_path)).fingerprint
    (tmp_path / "tokenizer_config.json").unlink()
    assert build_tokenizer(str(tmp_path)).fingerprint != plain


def test_tokenizer_without_start_token(tmp_path):
    write_tokenizer(tmp_path, specials=("<|endoftext|>",))
    tokenizer = build_tokenizer(str(tmp_path))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("a", bos=True, eos=True)[1:] == [tokenizer.eos_id]


def problem_of(path):
    with pytest.raises(ConfigError) as error:
        build_tokenizer(str(path))
    (problem,) = error.value.problems
    assert problem.key == "model.tokenizer_path"
    return problem


def test_missing(tmp_path):  # row 47
    for path in (tmp_path / "absent", tmp_path, tmp_path / "tokenizer.json"):
        problem = problem_of(path)
        assert problem.missing_asset and "tokenizer.json" in problem.problem
        assert ("original/tokenizer.model" in problem.problem) == (path.suffix == "")
        assert "torchtitan download --repo_id" in problem.fix


def test_other_formats(tmp_path):  # row 47
    for name in ("vocab.json", "merges.txt", "mine.model"):
        (tmp_path / name).write_text("{}")
    problem = problem_of(tmp_path)
    assert str(tmp_path / "vocab.json") in problem.problem and "mine.model" in problem.problem
    assert "none of tokenizer.json, tokenizer.model, original/tokenizer.model" in problem.problem
    assert "name the file itself" in problem.fix and "torchtitan download" in problem.fix
    assert not problem.missing_asset


def test_broken_files(tmp_path):  # row 48
    file = tmp_path / "tokenizer.json"
    write_tokenizer(tmp_path)
    whole = file.read_text("utf-8")
    content = json.loads(whole)
    content["model"]["merges"].append(["zzz", "yyy"])  # of tokens that are not in the vocabulary
    for text in (whole[: len(whole) // 2], "", "[]", json.dumps(content)):
        file.write_text(text, "utf-8")
        assert f"{file} is not a readable tokenizer" in problem_of(tmp_path).problem
    file.write_bytes(b"\xff\xfe\x00")
    assert "not a readable tokenizer" in problem_of(tmp_path).problem
    file.write_text(whole, "utf-8")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert "tokenizer_config.json is not readable" in problem_of(tmp_path).problem


def test_no_end_token(tmp_path):  # row 49
    write_tokenizer(tmp_path, specials=("<odd>",))
    assert "no end-of-text token" in problem_of(tmp_path).problem
    write_tokenizer(tmp_path, config={"eos_token": "<absent>"})
    assert "`<absent>` is not in its vocabulary" in problem_of(tmp_path).problem
