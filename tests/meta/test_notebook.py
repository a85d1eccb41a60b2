"""docs/start/notebook.ipynb runs as it is, in a kernel, which stays usable."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from torchtitan.metrics.records import read_records

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "start" / "notebook.ipynb"
GO_ON = """
config = torchtitan.load_config(config, {"training.steps": 100000, "metrics.log_freq": 1})
run = torchtitan.train(config)
print(run.status["status"], run.status["step"] in run.checkpoints)
"""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NotebookClient]:
    """The notebook and its kernel: this Python, whatever kernels the machine has."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": words, "display_name": "Python 3", "language": "python"}))
    for name in ("JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a figure is shown, not drawn in vain
    (tmp_path / "work").mkdir()
    client = NotebookClient(
        nbformat.read(NOTEBOOK, as_version=4),
        timeout=120,
        resources={"metadata": {"path": str(tmp_path / "work")}},
    )
    with client.setup_kernel():
        yield client


def press_stop(kernel: int, file: Path, step: int) -> None:
    """Interrupt the kernel, as Jupyter does, once the run has logged a step."""
    while all(record["step"] < step for record in read_records(file)):
        time.sleep(0.1)
    os.killpg(kernel, signal.SIGINT)


def test_the_notebook_runs_and_its_stop_button_saves(client: NotebookClient) -> None:
    cells = [cell for cell in client.nb.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    assert "step-50" in printed and "step-80" in printed and len(printed.split("def ", 1)[1]) > 99

    folder = Path(client.resources["metadata"]["path"]) / "outputs" / "notebook"
    more = nbformat.v4.new_code_cell(GO_ON)
    client.nb.cells.append(more)
    work = (client.km.provisioner.pid, folder / "metrics.jsonl", 82)
    stop = threading.Thread(target=press_stop, args=work, daemon=True)
    stop.start()
    client.execute_cell(more, len(client.nb.cells) - 1)
    stop.join()
    said = "".join(output["text"] for output in more.outputs if output.name == "stdout")
    assert said.split() == ["preempted", "True"]
