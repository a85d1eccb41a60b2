"""What documents are put between: the rule of the tokenizer's files, and `data.add_bos`."""

import base64
import json
import pickle

import pytest
from data_runs import make_documents, write_jsonl
from test_tokenizers import LLAMA3, write_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.data.document_ends import document_tokenizer
from torchtitan.data.identity import differences
from torchtitan.data.loader import LanePlan, build_loader
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.preflight.data import check_tokenizer

BOS, EOS, EOT = LLAMA3


def documents_of(folder, **data):
    """The run's tokenizer, as a worker process would have it."""
    config = JobConfig(data=data)
    tokenizer = document_tokenizer(build_tokenizer(str(folder)), config.data)
    return pickle.loads(pickle.dumps(tokenizer))  # noqa: S301


def ends_of(folder, **data):
    """The texts of the special tokens before and after the document `a`."""
    documents = documents_of(folder, **data)
    ids = documents.encode_document("a").tolist()
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = library.decode(ids, skip_special_tokens=False)
    assert f" {documents.describe()} ".count(f" {text.replace('a', ' TEXT ').strip()} ") == 1
    return tuple(text.split("a"))


def with_post_processor(folder, processor, specials=LLAMA3, config=None):
    library = write_tokenizer(folder, specials, config)
    library.post_processor = processor(library)
    library.save(str(folder / "tokenizer.json"))


def template(*tokens):
    def make(library):
        pairs = [(token, library.token_to_id(token)) for token in tokens if token != "$A"]
        single = TemplateProcessing(single=" ".join(tokens), special_tokens=pairs)
        return Sequence([ByteLevel(), single])  # as in the files of Llama 3

    return make


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (BOS, EOS)),
        ({"add_bos_token": False}, ("", EOS)),
        ({"add_bos_token": True}, (BOS, EOS)),
        ({"bos_token": None}, ("", EOS)),
        ({"bos_token": None, "add_bos_token": True}, ("", EOS)),
        ({"add_bos_token": True, "add_eos_token": False}, (BOS, "")),
        # Else nothing would stand between two documents.
        ({"add_bos_token": False, "add_eos_token": False}, ("", EOS)),
        ({"bos_token": EOS, "eos_token": EOS}, ("", EOS)),
        ({"bos_token": EOS, "eos_token": EOS, "add_bos_token": True}, ("", EOS)),
        # Not in the vocabulary, but not asked for either.
        ({"bos_token": "<odd>", "add_bos_token": False}, ("", EOS)),
    ],
)
def test_the_config_beside_a_tokenizer_is_followed(tmp_path, config, expected):
    write_tokenizer(tmp_path, config=config)
    assert ends_of(tmp_path) == expected


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (template(BOS, "$A"), (BOS, EOS)),
        (template("$A", EOS), ("", EOS)),
        (template("$A"), ("", EOS)),
        (template(EOT, "$A"), ("", EOS)),
        (lambda library: ByteLevel(), (BOS, EOS)),
    ],
)
def test_the_post_processor_is_followed(tmp_path, processor, expected):
    with_post_processor(tmp_path, processor)
    assert ends_of(tmp_path) == expected
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert ends_of(tmp_path) == (BOS, EOS)


def test_settings_decide_otherwise(tmp_path):
    write_tokenizer(tmp_path, config={"bos_token": None})
    assert ends_of(tmp_path, add_bos=True) == (BOS, EOS)
    assert ends_of(tmp_path, add_eos=False) == ("", "")
    write_tokenizer(tmp_path, config={"bos_token": EOS, "add_eos_token": False})
    assert ends_of(tmp_path) == (EOS, "")
    assert ends_of(tmp_path, add_eos=True) == ("", EOS)
    assert ends_of(tmp_path, add_bos=False) == ("", EOS)  # else nothing would stand between two
    assert ends_of(tmp_path, add_bos=True, add_eos=True) == (EOS, EOS)
    write_tokenizer(tmp_path, specials=("<|endoftext|>",), config={})
    with pytest.raises(ConfigError, match=r"data.add_bos = true: the tokenizer has no start token"):
        documents_of(tmp_path, add_bos=True)


def test_special_tokens_map(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": EOT}}))
    assert ends_of(tmp_path) == (BOS, EOT)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    assert ends_of(tmp_path) == (BOS, EOS)
    [conflict] = problems_of(tmp_path)
    assert f"'{EOS}' in tokenizer_config.json and '{EOT}' in special_tokens_map" in str(conflict)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOT}), "utf-8-sig")
    assert ends_of(tmp_path) == (BOS, EOT)  # some editors begin a file with a byte order mark
    (tmp_path / "special_tokens_map.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"special_tokens_map.json is not readable"):
        documents_of(tmp_path)


def test_a_start_token_that_does_not_exist(tmp_path):
    write_tokenizer(tmp_path, config={"bos_token": "<odd>"})
    with pytest.raises(ConfigError, match=r"no start-of-text token \(`<odd>` is not in its voc"):
        documents_of(tmp_path)


def problems_of(folder, **data):
    config = JobConfig(model={"tokenizer_path": str(folder)}, data=data)
    return check_tokenizer(RunContext(config, 1, "cpu"), with_model=False)


def test_a_missing_end_is_told(tmp_path):
    write_tokenizer(tmp_path, config={"add_eos_token": False})
    [problem] = problems_of(tmp_path)
    assert problem.key == "data.add_eos" and problem.severity == "warning"
    assert "add_eos_token is false in tokenizer_config.json" in problem.problem
    assert problems_of(tmp_path, add_eos=True) == problems_of(tmp_path, add_eos=False) == []


def test_the_files_beside_a_model_are_followed(tmp_path):
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    assert documents_of(tmp_path).describe() == f"each document is {BOS} TEXT {EOS}"
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert documents_of(tmp_path).encode_document("a").tolist() == [97, 257]
    unnamed = documents_of(tmp_path)
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert documents_of(tmp_path).fingerprint == unnamed.fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOT}))
    assert documents_of(tmp_path).describe() == f"each document is {BOS} TEXT {EOT}"
    assert documents_of(tmp_path).tokenizer.fingerprint != unnamed.tokenizer.fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<odd>"}))
    with pytest.raises(ConfigError, match=r"no end-of-text token \(`<odd>` is not in its voc"):
        documents_of(tmp_path)


def test_other_ends_are_other_data(tmp_path):
    """And both ends are what they were called before there was a choice."""
    path = write_jsonl(tmp_path, make_documents(50))
    write_tokenizer(tmp_path, config={"add_bos_token": False})
    tokenizer = build_tokenizer(str(tmp_path))

    def print_of(**data):
        config = JobConfig(training={"dataset_path": path, "seq_len": 16}, data=data)
        return build_loader(config.training, config.data, 1, tokenizer, plan).fingerprint

    plan = LanePlan(1, 1, 0, 1, 1)
    prints = [print_of(), print_of(add_bos=True), print_of(add_eos=False)]
    assert len(set(prints)) == 3 and print_of(add_bos=False) == prints[0]
    for before, now, key, was in (
        ("t", "t+bos", "data.add_eos", "true"),
        ("t+eos", "t", "data.add_bos", "false"),
        ("t+", "t+eos", "data.add_eos", "false"),
    ):
        [found] = differences({"tokenizer": before}, {"tokenizer": now}).items()
        assert found[0] == key and f"set it to {was}" in found[1]
    (tmp_path / "tokenizer_config.json").unlink()
    assert build_tokenizer(str(tmp_path)).fingerprint == tokenizer.fingerprint
    assert documents_of(tmp_path).fingerprint == tokenizer.fingerprint
    assert documents_of(tmp_path, add_bos=False).fingerprint == tokenizer.fingerprint + "+eos"
