"""`base`: the file that a TOML starts from, and bases that are wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from old_keys import problems_of

from torchtitan.cli import main
from torchtitan.config.base_files import read_files
from torchtitan.config.load import LoadedConfig, load_config, load_toml
from torchtitan.config.shipped import shipped_configs
from torchtitan.config.show import show_config
from torchtitan.config.toml_text import config_toml_text

Chain = Callable[..., LoadedConfig]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path of these tests starts in the folder of the files."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def told(call: Callable[[], object]) -> str:
    """Return the issues of a call, one a line."""
    return "\n".join(map(str, problems_of(call)))


# --- which file


@pytest.mark.parametrize("written", ["b.toml", "./b.toml", "../conf/b.toml", "{0}/conf/b.toml"])
def test_a_path_starts_in_the_folder_of_the_file_that_names_it(
    written: str, toml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    toml("conf/b.toml", "[training]\nsteps = 3\n")
    path = toml("conf/run.toml", f'base = "{written.format(tmp_path)}"\n')
    assert load_config([path]).config.training.steps == 3
    monkeypatch.chdir(tmp_path)
    assert load_config(["conf/run.toml"]).config.training.steps == 3


@pytest.mark.parametrize("written", ["$HERE/b.toml", "${HERE}/b.toml", "~/b.toml"])
def test_a_path_may_have_variables(written: str, toml, tmp_path: Path, monkeypatch):
    toml("b.toml", "[training]\nsteps = 3\n")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = toml("conf/run.toml", f'base = "{written}"\n')
    assert load_config([path]).config.training.steps == 3


def test_a_shipped_config_is_a_base_by_its_name(toml, tmp_path: Path):
    path = toml("llama3_8b.toml", 'base = "llama3_8b"\n[training]\nseq_len = 8\n')
    shipped = load_toml(shipped_configs()["llama3_8b"])
    config = load_toml(Path(path))
    assert config == shipped.model_copy(
        update={"training": shipped.training.model_copy(update={"seq_len": 8})}
    )
    (tmp_path / "llama3_8b").mkdir()  # as a run folder may be called
    assert load_toml(Path(path)) == config
    (tmp_path / "llama3_8b").rmdir()
    toml("llama3_8b", "[training]\nsteps = 7\n")
    assert load_toml(Path(path)).training.steps == 7, "a file beside it comes first"


def test_each_shipped_config_may_be_copied_anywhere(tmp_path: Path):
    for name, path in shipped_configs().items():
        assert main(["config", "copy", name, str(tmp_path)]) == 0
        assert load_toml(tmp_path / path.name) == load_toml(path)
    assert any(len(read_files(path)[0]) > 1 for path in shipped_configs().values())


# --- a base that is wrong


@pytest.mark.parametrize(
    ("bases", "circle"),
    [
        ({"a": "a.toml"}, "a.toml -> a.toml"),
        ({"a": "b.toml", "b": "./a.toml"}, "a.toml -> b.toml -> a.toml"),
        ({"a": "b.toml", "b": "c.toml", "c": "b.toml"}, "a.toml -> b.toml -> c.toml -> b.toml"),
        ({"a": "link.toml"}, "a.toml -> link.toml"),
    ],
)
def test_a_circle_is_refused_with_its_files(bases: dict[str, str], circle: str, toml, tmp_path):
    for name, base in bases.items():
        toml(f"{name}.toml", f'base = "{base}"\n')
    (tmp_path / "link.toml").symlink_to("a.toml")
    text = told(lambda: load_config([str(tmp_path / "a.toml")]))
    assert f"circle: {circle}. Fix" in text.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("written", "problem", "fix"),
    [
        ('"llama3_8c"', "conf/llama3_8c does not exist", 'did you mean "llama3_8b"?'),
        ('"llama3_8b.toml"', "conf/llama3_8b.toml does not exist", 'did you mean "llama3_8b"?'),
        ('"sub/llama3_8b.toml"', "does not exist", 'did you mean "llama3_8b"?'),
        ('"comon.toml"', "conf/comon.toml does not exist", 'did you mean "common.toml"?'),
        ('"../conf/comon.toml"', "does not exist", 'did you mean "../conf/common.toml"?'),
        ('"here.toml"', "conf/here.toml does not exist", 'did you mean "../cwd/here.toml"?'),
        ('"s3://bucket/x.toml"', "does not exist", "starts in the folder of the file"),
        ('"a\\u0000b"', "does not exist", "starts in the folder of the file"),
        (f'"{"x" * 300}"', "does not exist", "starts in the folder of the file"),
        ('"$NOT_SET/x.toml"', "has no variable NOT_SET", "set it where the run starts"),
        ('"common"', "conf/common does not exist", 'did you mean "common.toml"?'),
        ('"https://me:pass-word@host/x.toml"', "looks like a secret", "remove it here"),
        ('"folder"', "is a folder", "name a TOML file"),
        ('"run"', "is a folder", 'did you mean "run/config.toml"?'),
        ('""', "needs the name of one config", 'write for example `base = "llama3_8b"`'),
        ("3", "needs the name of one config", "write for example"),
        ('["llama3_8b", "common.toml"]', "needs the name of one", "may have a base of its own"),
        ("{llama3_8b = true}", "needs the name of one config", "write for example"),
    ],
)
def test_the_file_that_names_a_wrong_base_is_told(written, problem, fix, toml, tmp_path):
    toml("conf/common.toml", "")
    toml("conf/run/config.toml", "")
    (tmp_path / "conf/folder").mkdir()
    toml("cwd/here.toml", "")
    path = toml("conf/child.toml", f"base = {written}\n[training]\nstepps = 3\n")
    wrong, own = problems_of(lambda: load_config([path]))
    assert wrong.key == f"{path}: base"
    assert problem in str(wrong) and fix in wrong.fix and "pass-word" not in str(wrong)
    assert own.key == "training.stepps", "what is wrong in the file itself comes along"


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (b"[training]\nsteps = = 3\n", ":2:9", "is not valid TOML"),
        (b"[training]\n\xff\n", ":2:1", "is not UTF-8"),
        (b"a\0", ":1:2", "NUL byte"),
        (b"#" * 1_000_001, "", "is larger than 1 MB"),
        (None, "", "is not a regular file"),
    ],
)
def test_a_base_that_cannot_be_read_is_told(content, place: str, problem: str, toml, tmp_path):
    base = tmp_path / "b.toml"
    os.mkfifo(base) if content is None else base.write_bytes(content)
    path = toml("run.toml", 'base = "b.toml"\n')
    (issue,) = problems_of(lambda: load_config([path]))
    assert issue.key == f"{base}{place} (base of {path})" and problem in issue.problem


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[training]\nlr = 1.0\n", "training.lr"),
        ("[training]\nseq_len = 0\n", "training.seq_len"),
        ('[training]\nbatch_size = "x"\n', "training.batch_size"),
        ("[fault_tolerance]\nenable = true\n", "fault_tolerance.enable"),
        ('[[data.sources]]\npath = "x"\nweight = "y"\n', "data.sources[0].weight"),
        ('[handlers.lora]\ntoken = "hf_0123456789"\n', "handlers.lora.token"),
        ('[job]\nbase = "llama3_8b"\n', "job.base"),
    ],
)
def test_what_is_wrong_in_a_base_names_the_base(text: str, key: str, chain: Chain, tmp_path):
    (issue,) = problems_of(lambda: chain(text, "[training]\nsteps = 3\n"))
    assert issue.key == f"{tmp_path}/0.toml: {key}"
    (own,) = problems_of(lambda: chain("", text))
    assert own.key == f"{tmp_path}/1.toml: {key}"
    (alone,) = problems_of(lambda: chain(text))
    assert alone.key == key, "a file alone need not be named"


@pytest.mark.parametrize("key", ["base", "_base_", "extends", "include"])
def test_a_base_in_another_place_is_sent_to_the_top(key: str, toml):
    path = toml("run.toml", f'{key if key != "base" else "job.base"} = "llama3_8b"\n')
    fix = 'write above the first [section] of the file: base = "llama3_8b"'
    assert fix in told(lambda: load_config([path]))
    on_command_line = told(lambda: load_config([f"--{key}", "llama3_8b"]))
    assert 'write at the top of a TOML: base = "llama3_8b"' in on_command_line


# --- what is shown and stored


def test_the_files_are_shown(chain: Chain, tmp_path: Path):
    shown = show_config(chain("[training]\nsteps = 3\n", "", "[training]\nseq_len = 8\n"))
    names = [f"{tmp_path}/{index}.toml" for index in (2, 1, 0)]
    assert shown.splitlines()[0] == f"# {', based on '.join(names)}"
    rows = [line.split() for line in shown.splitlines()]
    assert ["steps", "=", "3", "#", names[2]] in rows
    assert ["seq_len", "=", "8", "#", names[0]] in rows
    assert show_config(chain("")).startswith("[job]")


def test_the_stored_config_needs_no_base(chain: Chain, tmp_path: Path):
    config = chain("[training]\nsteps = 3\n", "[training]\nseq_len = 8\n").config
    for index in range(2):
        (tmp_path / f"{index}.toml").unlink()
    stored = tmp_path / "config.toml"
    stored.write_text(config_toml_text(config))
    assert load_toml(stored) == config and len(read_files(stored)[0]) == 1


def test_the_schema_has_the_keys_at_the_top(capsys):
    assert main(["config", "schema"]) == 0
    keys = json.loads(capsys.readouterr().out)["properties"]
    assert keys["base"]["type"] == "string" and "by its name" in keys["base"]["description"]
    assert keys["unset"]["items"] == {"type": "string"}
    assert list(keys)[:3] == ["base", "unset", "job"]
