"""`base` and `unset`: a TOML that starts from another one."""

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
DEFAULT_LENGTH = 2048


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path of these tests starts in the folder of the files."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def toml(tmp_path: Path):
    """Writes a TOML and returns its path."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def chain(toml) -> Chain:
    """Loads the last of some TOMLs, of which each is the base of the next one."""

    def load(*texts: str, flags: tuple[str, ...] = ()) -> LoadedConfig:
        names = [f"{index}.toml" for index in range(len(texts))]
        paths = [
            toml(name, (f'base = "{names[index - 1]}"\n' if index else "") + texts[index])
            for index, name in enumerate(names)
        ]
        return load_config([paths[-1], *flags])

    return load


def told(call: Callable[[], object]) -> str:
    """Return the issues of a call, one a line."""
    return "\n".join(map(str, problems_of(call)))


# --- values


def test_later_sources_win_and_each_value_keeps_its_origin(chain: Chain, tmp_path: Path):
    loaded = chain(
        "[training]\nsteps = 1\nseq_len = 1\nlocal_batch_size = 1\nmax_norm = 9.0\n",
        "[training]\nsteps = 2\nseq_len = 2\nlocal_batch_size = 2\n",
        "[training]\nsteps = 3\nseq_len = 3\n",
        flags=("--training.steps", "4"),
    )
    section = loaded.config.training
    assert (section.steps, section.seq_len, section.local_batch_size) == (4, 3, 2)
    assert section.max_norm == 9.0 and section.dataset == "auto"
    files = [str(tmp_path / f"{index}.toml") for index in range(3)]
    names = ("max_norm", "local_batch_size", "seq_len", "steps", "dataset")
    origins = [loaded.origins[f"training.{name}"] for name in names]
    assert origins == [*files, "command line", "default"]


def test_tables_are_merged_and_lists_replaced(chain: Chain):
    loaded = chain(
        '[model]\nhandlers = ["compile"]\n[model.args]\nn_layers = 2\ndim = 64\n'
        '[handlers.lora]\nrank = 4\nalpha = 8\n[[data.sources]]\npath = "a"\nweight = 2.0\n',
        '[model]\nhandlers = ["lora"]\n[model.args]\nn_layers = 3\n'
        '[handlers.lora]\nrank = 5\n[[data.sources]]\npath = "b"\nweight = 1.0\n',
    ).config
    assert loaded.model.handlers == ("lora",)
    assert loaded.model.args == {"n_layers": 3, "dim": 64}
    assert loaded.handlers == {"lora": {"rank": 5, "alpha": 8}}
    assert [(source.path, source.weight) for source in loaded.data.sources] == [("b", 1.0)]


def test_a_quoted_key_of_a_free_table_stays_one_key(chain: Chain):
    own = '[model.args]\n"a.b" = 1\n'
    loaded = chain(own, '[model.args]\n"a.c" = 2\n', 'unset = ["model.args.a.b"]\n')
    assert loaded.config.model.args == {"a.c": 2}


def test_a_wrong_value_of_the_base_may_be_replaced(chain: Chain):
    wrong = '[training]\nseq_len = "long"\n'
    assert chain(wrong, "[training]\nseq_len = 8\n").config.training.seq_len == 8
    assert chain(wrong, 'unset = ["training.seq_len"]').config.training.seq_len == DEFAULT_LENGTH


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
    assert problem in str(wrong) and fix in wrong.fix
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


# --- unset


def test_unset_leaves_out_keys_and_tables(chain: Chain):
    base = (
        '[model]\ntokenizer_path = "x"\n[loss.args]\na = 1\nb = 2\n'
        "[handlers.lora]\nrank = 4\n[validation]\nfreq = 3\n"
    )
    names = ["model.tokenizer_path", "loss.args.a", "handlers.lora", "validation"]
    loaded = chain(base, f"unset = {names}\n[validation]\nsteps = 2\n")
    config = loaded.config
    assert "tokenizer_path" not in config.model.model_fields_set
    assert config.loss.args == {"b": 2} and config.handlers == {}
    assert (config.validation.freq, config.validation.steps) == (10, 2)
    assert loaded.origins["model.tokenizer_path"] == "default" and loaded.notices == ()


def test_unset_is_of_the_bases_alone(chain: Chain):
    unset = 'unset = ["training.steps"]\n'
    length = "[training]\nsteps = {}\n"
    assert chain(length.format(3), unset + length.format(4)).config.training.steps == 4
    assert chain(length.format(3), unset, length.format(5)).config.training.steps == 5
    flag = chain(length.format(3), unset, flags=("--training.steps=6",))
    assert flag.config.training.steps == 6


def test_unset_of_what_no_base_sets_gives_a_notice(chain: Chain, tmp_path):
    loaded = chain("", 'unset = ["loss.args.bta"]\n')
    told = f"{tmp_path}/1.toml: unset has no use for loss.args.bta: no base sets it"
    assert loaded.notices == (told,) and loaded.outdated == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('unset = ["training.stepps"]', "training.stepps: is unknown. Fix: did you mean"),
        ('unset = ["training.batch_size"]', "is training.local_batch_size today"),
        ('unset = ["nothing"]', "nothing: is not a section"),
        ("unset = [3]", "needs a list of names"),
        ('unset = "training.steps"', "needs a list of names"),
        ("unset = {training = true}", "needs a list of names"),
    ],
)
def test_a_wrong_unset_is_refused(text: str, problem: str, chain: Chain, tmp_path):
    issue = told(lambda: chain("", text))
    assert issue.startswith(f"{tmp_path}/1.toml: unset") and problem in issue


def test_unset_without_a_base_is_refused(toml):
    path = toml("run.toml", 'unset = ["training.steps"]\n')
    issue = told(lambda: load_config([path]))
    assert "leaves out what a base sets, and there is none" in issue


def test_who_writes_a_null_is_told_of_unset(chain: Chain):
    null = '[training]\nloss_chunks = "None"\n'
    assert "is left out by `unset` at the top" in told(lambda: chain("", null))
    assert "unset" not in told(lambda: chain(null))


# --- older keys: each file is translated by itself


def test_later_files_win_whichever_names_they_use(chain: Chain):
    old, today = "[training]\nbatch_size = {}\n", "[training]\nlocal_batch_size = {}\n"
    for first, second in ((old, today), (today, old), (old, old)):
        loaded = chain(first.format(3), second.format(5))
        assert loaded.config.training.local_batch_size == 5
        assert loaded.origins["training.local_batch_size"].endswith("1.toml")
    loaded = chain(old.format(3), 'unset = ["training.local_batch_size"]\n')
    assert "local_batch_size" not in loaded.config.training.model_fields_set


def test_a_switch_of_the_base_is_switched_off_by_any_name(chain: Chain):
    on, off = "[training]\ncompile = true\n", "[training]\ncompile = false\n"
    handlers = '[model]\nhandlers = ["compile", "lora"]\n'
    assert chain(on).config.model.handlers == ("compile",)
    assert chain(on, "").config.model.handlers == ("compile",)
    assert chain(on, off).config.model.handlers == ()
    assert chain(on, off, on).config.model.handlers == ("compile",)
    assert chain(handlers, off).config.model.handlers == ("lora",)
    assert chain(on, '[model]\nhandlers = ["lora"]\n').config.model.handlers == ("lora",)
    assert chain(on, 'unset = ["model.handlers"]\n').config.model.handlers == ()
    assert chain(on, 'unset = ["model"]\n').config.model.handlers == ()
    assert chain(on, off).origins["model.handlers"].endswith("1.toml")


def test_a_key_that_depends_on_others_sees_those_of_all_files(chain: Chain):
    old = "[experimental]\npipeline_parallel_degree = 2\npipeline_parallel_microbatches = 4\n"
    size = "[training]\nlocal_batch_size = {}\n"
    for texts in ((old, size.format(8)), (size.format(8), old)):
        config = chain(*texts).config
        assert config.parallelism.pipeline_parallel_microbatch_size == 2


def test_notices_and_the_hint_name_the_files(chain: Chain, tmp_path: Path, capsys):
    old = "[training]\nbatch_size = 3\n"
    loaded = chain(old, "", '[model]\nname = "llama"\n')
    files = [f"{tmp_path}/{index}.toml" for index in range(3)]
    assert loaded.notices == (
        f"{files[0]}: training.batch_size is training.local_batch_size today",
        f'{files[2]}: model.name = "llama" is "llama3" today',
    )
    assert [str(path) for path in loaded.outdated] == [files[0], files[2]]
    assert main(["train", files[2], "--check", "--parallelism.tensor_parallel_degree=7"]) == 2
    printed = capsys.readouterr().err
    for file in (files[0], files[2]):
        assert f"`torchtitan config convert {file}` writes the file" in printed
    assert f"config convert {files[1]}" not in printed
    assert chain(old).notices == ("training.batch_size is training.local_batch_size today",)


def test_a_converted_file_keeps_its_base_and_its_own_keys_alone(chain: Chain, tmp_path, capsys):
    loaded = chain(
        "[training]\nsteps = 7\nseq_len = 8\n[loss.args]\nx = 1\n",
        'unset = ["loss.args"]\n[training]\nbatch_size = 3\ncompile = true\n',
    )
    old = str(tmp_path / "1.toml")
    assert main(["config", "convert", old]) == 0
    assert capsys.readouterr().out.split("\n\n", 1)[1] == (
        'base = "0.toml"\nunset = [\n    "loss.args",\n]\n\n'
        '[model]\nhandlers = [\n    "compile",\n]\n\n[training]\nlocal_batch_size = 3\n'
    )
    for place in ("2.toml", "cwd/2.toml"):  # the base is found from there, too
        assert main(["config", "convert", old, str(tmp_path / place)]) == 0
        assert load_toml(tmp_path / place) == load_toml(tmp_path / "1.toml")
    assert 'base = "../0.toml"' in (tmp_path / "cwd/2.toml").read_text()
    assert loaded.config.training.seq_len == 8


def test_a_conversion_keeps_the_name_of_a_shipped_base(toml, tmp_path: Path):
    path = toml("run.toml", 'base = "llama3_8b"\n[training]\nbatch_size = 3\n')
    assert main(["config", "convert", path, str(tmp_path / "cwd" / "new.toml")]) == 0
    assert 'base = "llama3_8b"' in (tmp_path / "cwd" / "new.toml").read_text()


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
