"""Steps of random bytes, their copies in the S3 server of a test, and what is whole there."""

import random
import shutil
from pathlib import Path

from tests.s3_server import BUCKET, S3Server
from torchtitan.checkpoint.manifest import (
    Manifest,
    read_manifest,
    record_file,
    verify_share,
    write_manifest,
)
from torchtitan.checkpoint.remote import Uploads, remote_steps
from torchtitan.config import JobConfig
from torchtitan.config.schema import Checkpoint

RUN_ID = "abc123"
FILES = {".metadata": 300, "__0_0.distcp": 5000, "__1_0.distcp": 7000, "__2_0.distcp": 0}


def prefix_of(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/") + "/"


def make_step(run: Path, step: int, seed: int | None = None, run_id: str = RUN_ID) -> Manifest:
    """Write a step of random bytes; its sizes do not depend on the seed."""
    generator = random.Random(step if seed is None else seed)
    folder = run / "checkpoint" / f"step-{step}"
    folder.mkdir(parents=True)
    records = {}
    for name, size in FILES.items():
        content = generator.randbytes(size)
        (folder / name).write_bytes(content)
        records[name] = record_file(folder / name)
    write_manifest(folder, Manifest(run_id, step, False, records, {}, {"step": step}))
    return read_manifest(folder)


def upload_run(url: str, run: Path, run_id: str = RUN_ID, **section: object) -> str:
    """Upload the newest step, as the end of a job does."""
    settings = Checkpoint(enable=True, remote_folder=url, **section)  # type: ignore[arg-type]
    return Uploads(settings, run, run_id).finish()


def whole_steps(server: S3Server, url: str, tmp_path: Path) -> list[int]:
    """Return the committed steps of the store, each compared with its manifest."""
    prefix = prefix_of(url)
    objects = server.objects(prefix)
    steps = remote_steps(objects)
    for step in steps:
        place = f"checkpoint/step-{step}/"
        folder = tmp_path / "seen" / f"step-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in objects.items():
            if name.startswith(place):
                (folder / name.removeprefix(place)).write_bytes(content)
        verify_share(folder, read_manifest(folder), 0, 1)
    return steps


def config_of(
    url: str, run: Path, job: dict[str, object] | None = None, **section: object
) -> JobConfig:
    return JobConfig.model_validate(
        {
            "job": {"dump_folder": str(run), **(job or {})},
            "checkpoint": {"enable": True, "remote_folder": url, **section},
        }
    )
