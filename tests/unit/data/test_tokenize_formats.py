"""`torchtitan tokenize` on what is not files of bytes: Parquet, and datasets of one's own."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_runs import NUM_LANES, make_documents

from torchtitan import cli
from torchtitan.data import registry, token_files

LANES = f"--data.lanes={NUM_LANES}"


@pytest.fixture
def own(monkeypatch):
    """Registers a dataset for this test alone."""
    monkeypatch.setattr(registry.DATASETS, "_registered", dict(registry.DATASETS._registered))
    return lambda made: registry.register_dataset("own", lambda training, data: made)


def test_other_formats_are_shared_by_processes_too(tmp_path, monkeypatch, own):
    """Shards of about the wanted size, whatever a source cuts: row groups, rows, parts."""
    monkeypatch.setattr("torchtitan.data.tokenize._SMALLEST_BYTES", 2**14)
    texts = make_documents(4000)
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, file, row_group_size=50, compression="none")
    assert file.stat().st_size > 8 * 2**14
    words = ["tokenize", f"--training.dataset_path={file}", LANES]
    assert cli.main([*words, f"--output={tmp_path / 'parquet'}", "--workers=1"]) == 0
    words[1] = "--training.dataset=own"
    own([{"text": text} for text in texts])
    assert cli.main([*words, f"--output={tmp_path / 'own'}", "--workers=2"]) == 0
    registry.DATASETS._registered.pop("own")
    own(datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=6))
    assert cli.main([*words, f"--output={tmp_path / 'stream'}", "--workers=1"]) == 0
    for name, fewest, most in (("parquet", 5, 40), ("own", 20, 70), ("stream", 6, 6)):
        index = token_files.read_index(tmp_path / name)
        assert index.num_documents == 4000
        assert fewest <= len(index.shards) <= most, (name, len(index.shards))


def test_a_dataset_that_processes_cannot_have(tmp_path, capsys, own):
    class Local(list):
        """Pickle looks for classes by their names."""

    own(Local({"text": text} for text in make_documents(4000)))
    words = ["tokenize", "--training.dataset=own", LANES, f"--output={tmp_path / 'tokens'}"]
    assert cli.main([*words, "--workers=2"]) == 2
    assert "cannot be sent to processes" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()
    assert cli.main([*words, "--workers=1"]) == 0
