"""`torchtitan tokenize`, and runs on what it writes: the same samples as from the text."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_runs import NUM_LANES, Run, make_config, make_documents, write_jsonl
from test_bad_data import facts_for, only
from test_data_order import all_steps, lane_documents
from test_tokenizers import write_tokenizer
from test_worker_processes import folders, wait_until_gone

from torchtitan import cli
from torchtitan.config import ConfigError, DataError
from torchtitan.data import token_files
from torchtitan.data.registry import build_source
from torchtitan.preflight.data import check_environment

LANES = f"--data.lanes={NUM_LANES}"


def tokenize(path: str, output: Path, *arguments: str, workers: int = 1) -> int:
    words = [f"--training.dataset_path={path}", f"--output={output}", LANES]
    return cli.main(["tokenize", *words, f"--workers={workers}", *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Enough for several shards, as the tests make them."""
    (tmp_path / "text").mkdir()
    return write_jsonl(tmp_path / "text", make_documents(400))


@pytest.fixture
def tokens(text: str, tmp_path: Path, small_shards: None) -> Path:
    assert tokenize(text, tmp_path / "tokens") == 0
    return tmp_path / "tokens"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan.data.tokenize._SMALLEST_BYTES", 6000)


@pytest.mark.parametrize("shuffle", [False, True])
def test_same_samples_as_from_the_text(dataset, tmp_path_factory, small_shards, shuffle):
    """Whatever the text is stored in; over several epochs."""
    path, documents = dataset
    tokens = tmp_path_factory.mktemp("out") / "tokens"
    assert tokenize(path, tokens) == 0
    from_text = all_steps(make_config(path, epochs=2, shuffle=shuffle))
    for kind in ("auto", "tokens"):
        config = make_config(str(tokens), dataset=kind, epochs=2, shuffle=shuffle)
        assert np.array_equal(all_steps(config, dp=2), from_text)
    index = token_files.read_index(tokens)
    assert index.num_documents == len(documents) and index.dtype == "uint16"
    assert index.num_tokens == sum(len(text.encode()) + 2 for text in documents)


def test_other_lanes_read_every_document_once(tokens):
    config = make_config(str(tokens / "index.json"), epochs=1)
    steps = all_steps(config, num_lanes=2, global_batch=2)
    seen = [text for lane in range(2) for text in lane_documents(steps, lane)]
    assert Counter(seen) == Counter(make_documents(400))


def test_resume_and_workers(tokens):
    expected = all_steps(make_config(str(tokens), epochs=1))
    states, steps = None, []
    for num_workers, dp in ((0, 1), (2, 2), (0, 4), (1, 1)):
        run = Run(make_config(str(tokens), num_workers, epochs=1), dp, lane_states=states)
        steps += [run.step() for _ in range(5)]
        states = run.lane_states
        run.close()
    assert np.array_equal(np.stack(steps), expected[: len(steps)])


def test_tokens_in_a_mixture(tokens, text, tmp_path):
    """Beside the text of others; each as it is alone."""
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"{n}" * 40}) for n in range(90)))
    runs = []
    for path in (text, str(tokens)):
        sources = [{"path": path, "weight": 2}, {"path": str(other), "weight": 1}]
        runs.append(Run(make_config(None, sources=sources)))
    for _ in range(20):
        assert np.array_equal(runs[0].step(), runs[1].step())


def test_output_is_the_same_for_any_number_of_workers(text, tokens, tmp_path):
    """Whatever the order in which they finish: a process does not know of the others."""
    index = token_files.read_index(tokens)
    assert len(index.shards) > 4
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders())}
    script = (
        "import sys\n"
        "import torchtitan.data.tokenize as t\n"
        "from torchtitan.cli import main\n"
        "if __name__ == '__main__':\n"
        "    t._SMALLEST_BYTES = 6000\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "program.py").write_text(script)
    arguments = [f"--training.dataset_path={text}", f"--output={tmp_path / 'three'}", LANES]
    command = [sys.executable, str(tmp_path / "program.py"), "tokenize", *arguments]
    done = subprocess.run([*command, "--workers=3"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{index.num_tokens:,} tokens of 400 documents" in done.stdout
    assert contents(tmp_path / "three") == contents(tokens)


def test_large_vocabularies_need_four_bytes():
    assert token_files.token_dtype(2**16) == "uint16"
    assert token_files.token_dtype(2**16 + 1) == "uint32"


def test_uint32(text, tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan.data.token_files.token_dtype", lambda size: "uint32")
    monkeypatch.setattr("torchtitan.data.tokenize.token_dtype", lambda size: "uint32")
    assert tokenize(text, tmp_path / "wide") == 0
    assert token_files.read_index(tmp_path / "wide").dtype == "uint32"
    steps = all_steps(make_config(str(tmp_path / "wide"), epochs=1))
    assert np.array_equal(steps, all_steps(make_config(text, epochs=1)))


# Interrupted -----------------------------------------------------------------------------------

HELD = """
import multiprocessing, os, time
from torchtitan.data.registry import build_source, register_dataset
from torchtitan.data.sources_json import JsonSource

class Held(JsonSource):
    '''In a worker, reads the later half of the file only when nothing holds it back.'''
    def text(self, row):
        held = multiprocessing.parent_process() and row.place > self.files[0].size // 2
        while held and os.path.exists({hold!r}):
            time.sleep(0.01)
        return super().text(row)

def build(training, data):
    source = build_source(training.model_copy(update=dict(dataset="json")), data)
    return Held(source.files, data)

register_dataset("held", build, needs_path=True)
import torchtitan.data.tokenize
torchtitan.data.tokenize._SMALLEST_BYTES = 6000
"""


def test_killed_and_started_again(text, tmp_path):
    """What was finished is kept, what was begun is made again, no process stays behind."""
    hold, output = tmp_path / "hold", tmp_path / "tokens"
    (tmp_path / "held_dataset.py").write_text(HELD.format(hold=str(hold)))
    hold.touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *folders()])}
    arguments = ["--job.custom_import=held_dataset", "--training.dataset=held", LANES]
    arguments += [f"--training.dataset_path={text}", f"--output={output}", "--workers=2"]
    command = [sys.executable, "-m", "torchtitan.cli", "tokenize", *arguments]
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(output.glob("*.idx"))) < 2 or len(list(output.glob(".*.unfinished"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        pids = group(process.pid)
        assert len(pids) >= 3
    finally:
        process.kill()
        process.wait()
    wait_until_gone(pids)
    finished = {file: file.stat().st_mtime_ns for file in output.glob("*.idx")}
    assert not (output / "index.json").exists()
    unfinished = only(check_environment(facts_for(output)))
    assert "is not finished" in unfinished.problem and "come to its end" in unfinished.fix
    hold.unlink()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert finished == {file: file.stat().st_mtime_ns for file in finished}
    assert list(output.glob(".*.unfinished")) == [] and not (output / "job.json").exists()
    again = [part if "--output" not in part else f"--output={tmp_path / 'b'}" for part in command]
    assert subprocess.run(again, env=env).returncode == 0
    assert contents(output) == contents(tmp_path / "b")


def group(session: int) -> list[int]:
    """The processes of a session."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                pids.append(int(entry.name))
        except OSError:
            continue
    return pids


def test_a_damaged_shard_is_made_again(text, tokens):
    """Where the work is not complete; a complete folder is only checked."""
    whole = contents(tokens)
    (tokens / "index.json").rename(tokens / "index.old")
    index = json.loads((tokens / "index.old").read_text())
    (tokens / "index.old").unlink()
    job = json.dumps({"format": token_files.FORMAT, "job": index["job"]})
    (tokens / "job.json").write_text(job)
    (tokens / "00001.idx").write_bytes(whole["00001.idx"][:50])
    (tokens / "00002.bin").write_bytes(whole["00002.bin"][:-2])
    (tokens / "00003.bin").unlink()
    assert tokenize(text, tokens) == 0
    assert contents(tokens) == whole


def test_finished_is_checked(text, tokens, capsys):
    capsys.readouterr()
    before = contents(tokens)
    assert tokenize(text, tokens) == 0
    out = capsys.readouterr().out
    assert "complete already, and every file is intact" in out
    assert f"--training.dataset tokens --training.dataset_path {tokens} --data.lanes 4" in out
    assert contents(tokens) == before
    flip(tokens / "00002.bin", 7)
    assert tokenize(text, tokens) == 2
    assert "00002.bin is damaged" in capsys.readouterr().err


# Bad input -------------------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def edit_index(folder: Path, **values) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **values}))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


DAMAGES = {
    "short bin": (lambda d: cut(d / "00001.bin", -2), "00001.bin is cut short"),
    "short idx": (lambda d: cut(d / "00001.idx", -1), "00001.idx is cut short"),
    "long bin": (lambda d: (d / "00001.bin").open("ab").write(b"12"), "00001.bin is too long"),
    "no bin": (lambda d: (d / "00001.bin").unlink(), "00001.bin cannot be read: No such file"),
    "flipped bin": (lambda d: flip(d / "00001.bin", 9), "00001.bin is damaged"),
    "flipped idx": (lambda d: flip(d / "00001.idx", -9), "00001.idx is damaged"),
    "version": (lambda d: edit_index(d, version=2), "format version 2; this program reads 1"),
    "lacking": (lambda d: edit_index(d, counts={}), "index.json is damaged"),
    "unknown": (lambda d: edit_index(d, more=1), "index.json is damaged"),
    "dtype": (lambda d: edit_index(d, dtype="object"), "index.json is damaged"),
    "shards": (lambda d: edit_index(d, shards=[]), "index.json is damaged"),
    "no shard": (lambda d: edit_index(d, shards=[{"pieces": [0]}]), "index.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_row_58_damage_is_found_before_the_start(tokens, name):
    damage, expected = DAMAGES[name]
    assert check_environment(facts_for(tokens, lanes=4)) == []
    damage(tokens)
    problem = only(check_environment(facts_for(tokens, lanes=4)))
    assert problem.key == "training.dataset_path" and expected in problem.problem
    assert problem.value == str(tokens) and not problem.missing_asset


@pytest.mark.parametrize("name", ["../00000", 0])
def test_index_leads_nowhere_else(tokens, name):
    index = json.loads((tokens / "index.json").read_text())
    index["shards"][0]["name"] = name
    (tokens / "index.json").write_text(json.dumps(index))
    assert "index.json is damaged" in only(check_environment(facts_for(tokens))).problem


def test_not_a_folder_of_tokens(tmp_path):
    absent = only(check_environment(facts_for(tmp_path / "none", training__dataset="tokens")))
    assert absent.missing_asset and f"there is no folder {tmp_path / 'none'}" in absent.problem
    empty = only(check_environment(facts_for(tmp_path, training__dataset="tokens")))
    assert f"{tmp_path} holds no index.json" in empty.problem
    assert "correct the path" in absent.fix and absent.fix == empty.fix
    (tmp_path / "index.json").write_text('{"text": "a row"}\n')
    problem = only(check_environment(facts_for(tmp_path, training__dataset="tokens")))
    assert "is not an index of tokens" in problem.problem
    # Any file may be called so.
    assert build_source(facts_for(tmp_path).config.training, facts_for(tmp_path).config.data).files


@pytest.mark.parametrize("kind", ["json", "text", "parquet"])
def test_tokens_are_not_taken_for_other_data(tokens, kind):
    problem = only(check_environment(facts_for(tokens, lanes=4, training__dataset=kind)))
    assert problem.key == "training.dataset_path" and problem.problem == "holds tokens"


def test_tokens_of_another_tokenizer(tokens, tmp_path):
    write_tokenizer(tmp_path)
    context = facts_for(tokens, model__tokenizer_path=str(tmp_path), lanes=4)
    problem = only(check_environment(context))
    assert problem.key == "training.dataset_path"
    assert "another tokenizer (bytes-1) than model.tokenizer_path (json-" in problem.problem
    edit_index(tokens, tokenizer="json-1234")
    with pytest.raises(ConfigError, match=r"json-1234.*bytes-1"):
        Run(make_config(str(tokens)))


def test_damage_during_a_run_stops_it(tokens):
    """What no digest was compared for: a number that is no token never reaches the model."""
    (tokens / "00001.bin").write_bytes(b"\xff" * (tokens / "00001.bin").stat().st_size)
    run = Run(make_config(str(tokens), epochs=1))
    with pytest.raises(DataError, match=r"00001\.bin is damaged: document \d+ holds"):
        list(run.steps())


def test_fewer_tokens_than_a_step(tokens):
    context = facts_for(tokens, lanes=4, training__seq_len=2**17, data__epochs=1)
    problem = only(check_environment(context))
    assert problem.key == "data.epochs" and "tokens give at most 0 sequences" in problem.problem


def test_bad_rows(tmp_path, capsys):
    rows = [json.dumps({"text": text}) for text in make_documents(60)]
    rows[40:40] = ["{", '{"text": ""}', "{"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    assert tokenize(str(path), tmp_path / "tokens") == 3
    assert "a.jsonl:41 (byte" in capsys.readouterr().err
    skip = ("--data.on_bad_row=skip", "--data.max_bad_rows")
    assert tokenize(str(path), tmp_path / "tokens", *skip, "1") == 3
    assert "data.max_bad_rows = 1" in capsys.readouterr().err
    assert tokenize(str(path), tmp_path / "tokens", *skip, "2") == 0
    assert "60 documents" not in (out := capsys.readouterr().out) and "2 rows left out" in out
    steps = all_steps(make_config(str(tmp_path / "tokens"), epochs=1))
    text = all_steps(make_config(str(path), epochs=1, on_bad_row="skip"))
    assert np.array_equal(steps, text)


def test_options_that_cannot_be(text, tokens, tmp_path, capsys):
    def refused(*arguments, status=2):
        assert cli.main(["tokenize", *arguments]) == status
        return capsys.readouterr().err

    data = f"--training.dataset_path={text}"
    output = f"--output={tmp_path / 'new'}"
    assert "arguments are required: --output" in refused(data)
    assert "--output: expected one argument" in refused(data, "--output")
    assert "--workers: 0 is not a whole number" in refused(data, output, "--workers=0")
    assert "x is not a whole number" in refused(data, output, "--shard-mib", "x")
    assert "training.dataset_path" in refused(output)
    assert "data.lanes" in refused(data, output, "--data.lanes=100000")
    assert "holds tokens already" in refused(f"--training.dataset_path={tokens}", output)
    assert "--source" in refused(data, output, "--source=web")
    assert not (tmp_path / "new").exists()
    assert "other data" in refused(data, f"--output={tokens}", "--data.lanes=2")
    assert "holds other files" in refused(data, f"--output={tmp_path}")
    inside = f"--output={tmp_path / 'text' / 'new'}"
    folder = f"--training.dataset_path={tmp_path / 'text'}"
    assert "lies in the data" in refused(folder, LANES, inside)


def test_one_of_several_sources(text, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        f'[data]\nlanes = 4\n[[data.sources]]\npath = "{text}"\nweight = 1\nname = "web"\n'
        '[[data.sources]]\ndataset = "stdlib"\nweight = 1\n'
    )
    words = ["tokenize", str(tmp_path / "run.toml"), "--workers=1"]
    assert cli.main([*words, f"--output={tmp_path / 'web'}"]) == 2
    assert "one of web, stdlib" in capsys.readouterr().err
    assert cli.main([*words, f"--output={tmp_path / 'web'}", "--source", "wab"]) == 2
    assert 'did you mean "web"' in capsys.readouterr().err
    assert cli.main([*words, f"--output={tmp_path / 'web'}", "--source", "web"]) == 0
    index = token_files.read_index(tmp_path / "web")
    assert index.num_documents == 400 and index.source["kind"] == "json"


def test_a_folder_in_use(text, tmp_path, capsys):
    import fcntl

    (tmp_path / "tokens").mkdir()
    with open(tmp_path / "tokens" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert tokenize(text, tmp_path / "tokens") == 2
    assert "another job is using it" in capsys.readouterr().err


def test_help(capsys):
    assert cli.main(["tokenize", "--help"]) == 0
    assert "--output DIR" in capsys.readouterr().out
