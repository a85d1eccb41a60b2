"""`torchtitan.train` called by the ranks of a launcher."""

import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from tests.distributed.runs import environment
from tests.forked import ForkedRun, launcher_variables

SCRIPT = """
import json, os, torchtitan

settings = {
    "model.args": {"n_layers": 2, "dim": 32, "n_heads": 4},
    "training": {"dataset": "stdlib", "local_batch_size": 2, "global_batch_size": 4},
    "training.seq_len": 32, "training.steps": 2, "training.mixed_precision_param": "float32",
    "lr_scheduler.warmup_steps": 1, "checkpoint.enable": True, "metrics.log_freq": 1,
    "job.device": "cpu", "job.dump_folder": "run",
}
config = torchtitan.load_config(None, settings)
torchtitan.train(config)
lost = {"job.dump_folder": "other", "training.dataset": "text", "training.dataset_path": "lost"}
try:  # rank 0 alone looks for the files
    torchtitan.train(torchtitan.load_config(config, lost))
except torchtitan.ConfigError as error:
    refused = [issue.key for issue in error.problems]
changes = {"training.steps": 3, "parallelism.tensor_parallel_degree": 2}
run = torchtitan.train(torchtitan.load_config(config, changes))
print(json.dumps([os.environ["RANK"], refused, run.metrics()["step"], os.path.exists("other")]))
"""


def test_ranks_train_twice_and_refuse_together(tmp_path: Path) -> None:
    with ExitStack() as stack:
        words = [sys.executable, "-c", SCRIPT]
        ranks = [
            stack.enter_context(closing(ForkedRun(words, environment() | place, tmp_path)))
            for place in launcher_variables(2)
        ]
        done = [rank.wait(120) for rank in ranks]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    for rank, each in enumerate(done):
        expected = [str(rank), ["training.dataset_path"], [1, 2, 3], False]
        assert json.loads(each.stdout.splitlines()[-1]) == expected
