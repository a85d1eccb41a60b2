"""Runs with the tokenizers of tests/assets, as TorchTitan's debug TOMLs name them."""

from pathlib import Path

from tests.distributed import runs

ASSETS = Path(__file__).parents[1] / "assets"
MODEL = ("--model.name=llama2", "--model.norm_type=layernorm", "--model.args.vocab_size=2304")


def test_tiktoken_trains_and_another_tokenizer_does_not_go_on(tmp_path):  # row 52
    folder = tmp_path / "run"
    one = f"--model.tokenizer_path={ASSETS / 'test_tiktoken.model'}"
    workers = "--training.dataloader.num_workers=1"
    runs.run(folder, *MODEL, one, workers, "--training.steps=2")
    losses = [loss for _, loss, _ in runs.curve(folder)]
    assert len(losses) == 2 and 7.5 < losses[0] < 8.0  # ln 2304 = 7.74
    other = f"--model.tokenizer_path={ASSETS / 'tokenizer'}"
    refused = runs.run(folder, *MODEL, other, "--training.steps=4", expect=2)
    assert "tokenizer" in refused.stderr and "allow_dataset_change" in refused.stderr
