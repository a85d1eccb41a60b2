"""Secrets are recognised, and settings that merely sound like one are not."""

import pytest

from torchtitan.config.fields import known_keys
from torchtitan.config.keys_check import split_known
from torchtitan.utils.redaction import (
    holds_a_secret,
    is_secret,
    names_a_secret,
    redact,
    redact_tree,
)

HF = "hf_" + "aB3" * 10


@pytest.mark.parametrize(
    "key",
    [
        "hf_token",
        "token",
        "HF-TOKEN",
        "wandb.api_key",
        "apikey",
        "secret",
        "my_password",
        "aws_access_key",
        "ssh_key",
        "credentials",
    ],
)
def test_names(key: str):
    assert names_a_secret(key)


@pytest.mark.parametrize("key", ["tokenizer_path", "num_tokens_seen", "keep_latest_k", "monkey"])
def test_names_of_other_things(key: str):
    assert not names_a_secret(key)


def test_secrets_are_found_in_tables_and_lists():
    for value in (HF, [HF], [{"path": f"s3://me:{HF}@host"}], {"a": {"token": "1"}}, [["x", [HF]]]):
        assert is_secret("key", value)
    assert is_secret("handlers.mine.api_key", "abc")
    assert is_secret("tokens", {"token": [1, "abc"]})
    for value in (0.5, True, 3, [0.5, 1], {"a": {"b": 0.5}}, None):
        assert not is_secret("loss.args.token_weight", value)
    for value in ("text", 4, None, [{"path": "s3://host"}], {"a": {"tokenizer": "b"}}):
        assert not is_secret("key", value)


def test_numbers_in_free_tables_are_no_secrets():
    for args in ({"token_weight": 0.5}, {"token_weights": {"a": [1, True]}}):
        assert split_known({"loss": {"args": args}}) == ({"loss": {"args": args}}, [])
    _, [problem] = split_known({"loss": {"args": {"token_weight": "0.5"}}})
    assert "looks like a secret" in str(problem)


def test_no_setting_is_called_like_a_secret():
    assert [name for name in known_keys() if names_a_secret(name)] == []


@pytest.mark.parametrize(
    "value",
    [HF, "ghp_" + "a1" * 15, "sk-" + "Ab3-" * 8, "AKIA" + "ABCD1234" * 2, "https://me:word@host/x"],
)
def test_values(value: str):
    assert holds_a_secret(f"x {value} y")
    assert value.split("//")[-1].split("@")[0] not in redact(f"x {value} y")


@pytest.mark.parametrize("value", ["./outputs", "hf_model", "https://host:80/x", "sk-small", ""])
def test_plain_values(value: str):
    assert not holds_a_secret(value)
    assert redact(value) == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('hf_token = "abc"', "hf_token = <hidden>"),
        ('{"api_key": "abc", "x": 1}', '{"api_key": <hidden>, "x": 1}'),
        ("--hf_token abc --steps 3", "--hf_token <hidden> --steps 3"),
        ("password=abc", "password=<hidden>"),
        ('tokenizer_path = "bytes"', 'tokenizer_path = "bytes"'),
    ],
)
def test_redact_assignments(text: str, shown: str):
    assert redact(text) == shown


@pytest.mark.fault("F57")
def test_redact_tree():
    tree = {
        "hf_token": "plain",
        "unset_token": None,
        "data": [{"path": "https://me:word@host/x"}, 3, ("a", HF)],
        "model": {"tokenizer_path": "tok", "api_key": {"deep": "x"}},
        "args": {"token_weight": 0.5, "token_weights": [0.5], "secret": {"deep": 1}},
    }
    assert redact_tree(tree) == {
        "hf_token": "<hidden>",
        "unset_token": None,
        "data": [{"path": "https://<hidden>@host/x"}, 3, ["a", "<hidden>"]],
        "model": {"tokenizer_path": "tok", "api_key": "<hidden>"},
        "args": {"token_weight": 0.5, "token_weights": [0.5], "secret": {"deep": 1}},
    }
