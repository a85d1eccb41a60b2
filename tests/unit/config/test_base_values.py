"""Values of a TOML and of those that it is based on: merging, `unset`, older keys."""

from collections.abc import Callable
from pathlib import Path

import pytest
from old_keys import problems_of

from torchtitan.cli import main
from torchtitan.config.load import LoadedConfig, load_config, load_toml

Chain = Callable[..., LoadedConfig]
DEFAULT_LENGTH = 2048


def told(call: Callable[[], object]) -> str:
    """Return the issues of a call, one a line."""
    return "\n".join(map(str, problems_of(call)))


# --- merging


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
    loaded = chain("[training]\ncompile = true\n", 'unset = ["model.handlers"]\n')
    assert loaded.config.model.handlers == () and loaded.notices == ()


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
    (tmp_path / "sub").mkdir()
    assert main(["config", "convert", old]) == 0
    assert capsys.readouterr().out.split("\n\n", 1)[1] == (
        'base = "0.toml"\nunset = [\n    "loss.args",\n]\n\n'
        '[model]\nhandlers = [\n    "compile",\n]\n\n[training]\nlocal_batch_size = 3\n'
    )
    for place in ("2.toml", "sub/2.toml"):  # the base is found from there, too
        assert main(["config", "convert", old, str(tmp_path / place)]) == 0
        assert load_toml(tmp_path / place) == load_toml(tmp_path / "1.toml")
    assert 'base = "../0.toml"' in (tmp_path / "sub/2.toml").read_text()
    assert loaded.config.training.seq_len == 8


def test_a_conversion_keeps_the_name_of_a_shipped_base(toml, tmp_path: Path):
    path = toml("run.toml", 'base = "llama3_8b"\n[training]\nbatch_size = 3\n')
    (tmp_path / "sub").mkdir()
    assert main(["config", "convert", path, str(tmp_path / "sub")]) == 0
    assert 'base = "llama3_8b"' in (tmp_path / "sub" / "run.toml").read_text()
