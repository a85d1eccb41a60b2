"""What the check before a start says of batch, lanes and data of the run that it goes on with."""

import json
from pathlib import Path
from typing import Any

import pytest
from folders import make_config, open_folder, plant_step, snapshot, stopped_run

from torchtitan.checkpoint.decision import with_stored_batch
from torchtitan.cli import main
from torchtitan.config.run_context import RunContext
from torchtitan.data.identity import differences, fingerprint_of, summary_of
from torchtitan.data.loader import build_mixture, data_facts
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.preflight import ARITHMETIC, preflight

SECTIONS: dict[str, Any] = {"lr_scheduler": {"warmup_steps": 2}, "training": {"seq_len": 64}}
WORDS = ["--training.seq_len=64", "--lr_scheduler.warmup_steps=2", "--checkpoint.enable"]
ASSETS = Path(__file__).parents[2] / "assets"


def texts(*context: RunContext) -> list[str]:
    return [str(problem) for each in context for problem in preflight(each, [ARITHMETIC])]


@pytest.mark.fault("F31")
@pytest.mark.parametrize("world_size, local", [(1, 1), (2, 1), (1, 2)])
def test_smaller_mesh_keeps_the_batch(tmp_path: Path, world_size: int, local: int) -> None:
    """Two ranks of two sequences each trained it: 4 lanes would not divide what is open here."""
    lanes = {"lanes": 4}
    warmup, stdlib = SECTIONS["lr_scheduler"], {"dataset": "stdlib"}
    open_folder(
        tmp_path, 2, training=stdlib | {"local_batch_size": 2}, data=lanes, lr_scheduler=warmup
    )
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    sections = {"training": stdlib | {"local_batch_size": local}, "lr_scheduler": warmup}
    config = make_config(tmp_path, data=lanes, **sections)
    context = RunContext(config, world_size, "cpu")
    assert "does not divide the global batch" in "".join(texts(context))
    assert texts(with_stored_batch(context)) == []
    assert with_stored_batch(context).global_batch_size == 4
    # A batch that is set is what it is; a run that is moved aside binds nothing.
    for more in ({"training": stdlib | {"global_batch_size": 2}}, {"job": {"new_run": True}}):
        other = make_config(tmp_path, **{**sections, **more})
        resolved = with_stored_batch(RunContext(other, world_size, "cpu"))
        assert resolved.global_batch_size == RunContext(other, world_size, "cpu").global_batch_size


def test_more_steps_keep_the_warmup(tmp_path: Path) -> None:
    """Two of ten steps: the check of a start of more steps does not say that they are four."""
    stopped_run(tmp_path, 10, training={"steps": 10})
    context = RunContext(make_config(tmp_path, training={"steps": 20}), 1, "cpu")
    assert with_stored_batch(context).config.lr_scheduler.warmup_steps == 2
    assert not any("warmup" in text for text in texts(with_stored_batch(context)))
    assert any("and 4 in this run" in text for text in texts(context))


def test_check_takes_the_batch_of_the_run(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", 40)
    words = [f"--training.dataset_path={tmp_path / 'a.jsonl'}", "--data.lanes=2", *WORDS]
    words += ["--training.local_batch_size=1", f"--job.dump_folder={tmp_path / 'run'}"]
    assert main(["train", *words, "--training.steps=20", "--check=full"]) == 2
    training = {"dataset_path": str(tmp_path / "a.jsonl"), "local_batch_size": 1, "seq_len": 64}
    open_folder(tmp_path / "run", 2, **SECTIONS | {"training": training, "data": {"lanes": 2}})
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert main(["train", *words, "--training.steps=20", "--check=full"]) == 0


# --- other data -----------------------------------------------------------------------------------


def rows(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps({"text": f"row {n} " * 40}) + "\n" for n in range(count)))


def run_of(folder: Path, **sections: Any) -> None:
    """A finished run of 20 steps, as far as names and manifests tell."""
    opened = open_folder(folder, **sections)
    config = opened.config
    mixture = build_mixture(
        config.training,
        config.data,
        config.debug.seed,
        build_tokenizer(config.model.tokenizer_path),
        config.data.lanes or 0,
    )
    context = data_facts(mixture)
    state = {"data_fingerprint": fingerprint_of(context), "data_summary": summary_of(context)}
    info = {key: value for key, value in opened.run_info().items() if key != "run_id"}
    plant_step(folder, 20, opened.decision.run_id, state=state | {"finished": True}, info=info)
    opened.set_status("completed", 20, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], ""),
        (["--training.dataset_path={}/b.jsonl"], "a.jsonl is gone, b.jsonl is new"),
        ([f"--model.tokenizer_path={ASSETS}/tokenizer"], "bytes-1 in the checkpoint, json-"),
        (["--training.dataset_path={}/b.jsonl", "--checkpoint.allow_dataset_change"], ""),
        (["--training.dataset_path={}/b.jsonl", "--job.new_run"], ""),
    ],
)
def test_check_compares_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    rows(tmp_path / "a.jsonl", 40)
    rows(tmp_path / "b.jsonl", 50)
    training = {"dataset_path": str(tmp_path / "a.jsonl"), "seq_len": 64}
    run_of(tmp_path / "run", **SECTIONS | {"training": training})
    before = snapshot(tmp_path)
    words = [word.format(tmp_path) for word in arguments]
    if "dataset_path" not in " ".join(words):
        words.append(f"--training.dataset_path={tmp_path}/a.jsonl")
    words += [*WORDS, "--training.local_batch_size=4", f"--job.dump_folder={tmp_path / 'run'}"]
    assert main(["train", *words, "--training.steps=30", "--check=full"]) == (2 if message else 0)
    captured = capsys.readouterr().err
    assert message in captured
    if message:
        assert f"error: {arguments[0].partition('=')[0].strip('-')}: differs from" in captured
    assert snapshot(tmp_path) == before


def test_how_data_differ() -> None:
    def summary(files: Any, **more: Any) -> dict[str, Any]:
        return summary_of({"data": {"kind": "json", "files": files}, "seq_len": 64, **more})

    before = summary([["a", 1000], ["b", 5]])
    assert differences(before, before) == {}
    changed = differences(before, summary([["a", 2000], ["c", 5]], seq_len=32))
    assert changed == {
        "training.dataset_path": "b is gone, c is new, a had 1,000 bytes and has 2,000",
        "training.seq_len": "64 in the checkpoint, 32 now",
    }
    many = [[f"file-{n}", n] for n in range(1000)]
    text = differences(summary(many), summary([*many, ["x", 7]]))["training.dataset_path"]
    assert (
        text == "1,000 files of 499,500 bytes in the checkpoint, 1,001 files of 499,507 bytes now"
    )
    assert len(json.dumps(summary(many))) < 300
    digest = differences(summary([["a", 5, "64:12"]]), summary([["a", 5, "64:13"]]))
    assert digest == {"training.dataset_path": "a has other content at the same size"}
    assert "does not say which" in differences(None, before)["training.dataset_path"]
