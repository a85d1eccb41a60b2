"""`torchtitan replay`: a step of a run once more, compared with what the run recorded. No torch."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan import preflight
from torchtitan.commands.replay_report import compare, describe, known_of
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE, FAILED, NON_FINITE
from torchtitan.config.load import load_config
from torchtitan.config.paths import expand_path
from torchtitan.config.run_context import RunContext
from torchtitan.training.pretrained_config import with_pretrained
from torchtitan.training.replay import Prepared, launch, prepare
from torchtitan.utils.environment import guess_device_type
from torchtitan.utils.processes import StopRequest


def run(options: argparse.Namespace) -> int:
    """Repeat the step and print the comparison; exit status 0 if nothing differs."""
    run, step = Path(expand_path(options.run)).resolve(), options.step
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        text = "replay starts the processes of its mesh itself"
        raise ConfigError(ConfigIssue("WORLD_SIZE", text, "run it without a launcher", local=True))
    before = known_of(run, step)
    settings = [f"--job.device={options.device}"] if options.device else []
    with new_folder(options.keep) as folder:
        prepared = prepare(run, step, folder, options.mesh, [*settings, *options.settings])
        before.require()
        check(prepared)
        code = launch(prepared)
        now = known_of(folder, step)
        if code not in (DONE, NON_FINITE) or (now.record is None and not now.failure):
            print(f"the replay did not reach step {step}", file=sys.stderr)
            return code or FAILED
        report = compare(prepared, before, now)
    print(json.dumps(report, ensure_ascii=False) if options.json else "\n".join(describe(report)))
    return FAILED if report["result"] == "different" else DONE


def check(prepared: Prepared) -> None:
    """Raise ConfigError for settings that do not fit the mesh, before a launcher is started."""
    if problems := import_custom_modules(prepared.config, quiet=True):
        raise ConfigError(problems)
    config = with_pretrained(load_config([str(prepared.file)]), with_weights=False).config
    device: str = config.job.device
    device = guess_device_type() if device == "auto" else device
    context = RunContext(config, prepared.world_size, device)
    preflight.require(context, [preflight.ARITHMETIC], quiet=True)  # train prints the warnings


@contextmanager
def new_folder(kept: str | None) -> Iterator[Path]:
    """Yield a new folder, which stays if it is to be `kept` there; signals raise StopRequested."""
    if kept is None:
        with StopRequest(at_once=True):
            path = Path(tempfile.mkdtemp(prefix="torchtitan-"))
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
        return
    path = Path(expand_path(kept)).resolve()
    try:
        path.mkdir(parents=True)
    except OSError as error:
        text = f"cannot be made: {error.strerror or error}"
        raise ConfigError(ConfigIssue("--keep", text, "name a new folder", kept)) from error
    with StopRequest(at_once=True):
        yield path
