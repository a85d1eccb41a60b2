"""`torchtitan config diff`: the settings in which configs, shipped ones and runs differ."""

from pathlib import Path

import pytest

from torchtitan.cli import main
from torchtitan.config.load import load_config
from torchtitan.config.toml_text import config_toml_text

ITEMS = '[[data.sources]]\npath = "{}"\nweight = {}\n'


@pytest.fixture
def diff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return the lines of a diff of two TOMLs, given as text, that say something."""
    monkeypatch.chdir(tmp_path)

    def run(first: str, second: str) -> list[str]:
        Path("a.toml").write_text(first)
        Path("b.toml").write_text(second)
        assert main(["config", "diff", "a.toml", "b.toml"]) == 0
        head, *lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line]
        assert head == "a.toml -> b.toml"
        return lines

    return run


@pytest.fixture
def problem_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return what is printed about a diff that cannot be made."""
    monkeypatch.chdir(tmp_path)

    def run(*names: str) -> str:
        assert main(["config", "diff", *names]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    return run


def test_a_setting_that_one_file_leaves_out_has_its_default(diff):
    assert diff("[training]\nseq_len = 2048\n", "") == ["no setting differs"]
    lines = diff("[training]\nseq_len = 64\n", "")
    assert lines[:2] == ["[training]", "seq_len: 64 -> 2048"]
    assert lines[-1] == "1 setting differs: 1 for another run"


def test_sections_come_once_in_the_order_of_a_config(diff):
    first = "[debug]\nseed = 3\n[training]\nsteps = 5\n[training.dataloader]\nnum_workers = 2\n"
    lines = diff(first, "[model.args]\nn_layers = 4\n[handlers.lora]\nrank = 2\n")
    headings = [line for line in lines if line.startswith("[")]
    assert headings == [
        "[model.args]",
        "[handlers.lora]",
        "[training]",
        "[training.dataloader]",
        "[debug]",
    ]
    assert "n_layers: unset -> 4" in lines and "rank: unset -> 2" in lines


def test_a_value_of_the_base_counts(diff):
    lines = diff('base = "llama3_8b"\n', 'base = "llama3_8b"\n[optimizer]\nlr = 1e-4\n')
    assert lines[:2] == ["[optimizer]", "lr: 0.0003 -> 0.0001"]


def test_what_a_resume_may_change_is_marked_with_the_reason(diff):
    lines = diff(
        "[training]\nsteps = 5\nseq_len = 64\n",
        "[training]\nsteps = 7\nseq_len = 32\nglobal_batch_size = 16\n"
        "[parallelism]\ntensor_parallel_degree = 2\n",
    )
    assert "steps: 5 -> 7  (may change)" in lines, "a run may become longer"
    assert "seq_len: 64 -> 32" in lines
    assert "tensor_parallel_degree: 1 -> 2  (may change: the mesh)" in lines
    open_size = "global_batch_size: -1 -> 16  (may change: the run sets what is left open)"
    assert open_size in lines
    others = "3 that may change when a run resumes"
    assert lines[-1] == f"4 settings differ: 1 for another run, {others}"
    shorter = diff("[training]\nsteps = 7\n", "[training]\nsteps = 5\n")
    assert "steps: 7 -> 5" in shorter, "a run cannot become shorter"
    mesh = diff("", "[parallelism]\ntensor_parallel_degree = 2\n")
    assert mesh[-1] == "1 setting differs: 1 that may change when a run resumes"


def test_tables_of_a_list_are_compared_key_by_key(diff):
    one, moved, heavier = ITEMS.format("x", 1.0), ITEMS.format("y", 1.0), ITEMS.format("x", 2.0)
    lines = diff(one, moved)
    assert lines[1].startswith('sources[0].path: "x" -> "y"  (may change: ')
    assert diff(one, heavier)[1] == "sources[0].weight: 1.0 -> 2.0"
    more = diff(one, one + moved)
    assert more[1].startswith('sources[1]: unset -> {path = "y"'), more
    both = diff(one, ITEMS.format("y", 2.0))
    assert "(may change" in both[1] and both[2] == "sources[0].weight: 1.0 -> 2.0"


def test_a_run_folder_is_its_stored_config(tmp_path: Path, diff, capsys):
    Path("run").mkdir()
    text = config_toml_text(load_config(["debug_model", "--training.steps", "30"]).config)
    Path("run", "config.toml").write_text(text)
    assert main(["config", "diff", "debug_model", "run"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 200 -> 30" in printed and "config_file" not in printed
    assert main(["config", "diff", "run/config.toml", "run"]) == 0
    assert capsys.readouterr().out.endswith("no setting differs\n")


def test_a_folder_that_is_no_run_does_not_hide_a_shipped_config(diff):
    Path("llama3_8b").mkdir()  # of downloaded weights, say
    assert load_config(["llama3_8b"]).config.model.flavor == "8B"
    assert main(["config", "diff", "llama3_8b", "llama3_70b"]) == 0


def test_what_cannot_be_compared_is_told_for_both(tmp_path: Path, problem_of):
    Path("nothing").mkdir()
    Path("empty").mkdir()
    Path("empty", "config.toml").touch()  # as a crash of the machine may leave it
    Path("bad.toml").write_text("[training]\nseq_len = 0\n")
    for folder in ("nothing", "empty"):
        assert f"{folder}: is a folder without a config.toml" in problem_of(folder, "debug_model")
    told = problem_of("bad.toml", "lama3_8b")
    assert "bad.toml: training.seq_len = 0: must be more than 0" in told
    assert "lama3_8b: does not exist. Fix: did you mean `llama3_8b`" in told
    assert "write `torchtitan config diff A B`" in problem_of("debug_model")
    assert "takes no more arguments" in problem_of("debug_model", "debug_model", "debug_model")


def test_a_notice_names_the_file(tmp_path: Path, diff, monkeypatch, capsys):
    Path("old.toml").write_text("[training]\nbatch_size = 3\n")
    assert main(["config", "diff", "old.toml", "debug_model"]) == 0
    told = "notice: old.toml: training.batch_size is training.local_batch_size today"
    assert told in capsys.readouterr().err
