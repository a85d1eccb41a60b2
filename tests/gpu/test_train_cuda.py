"""Training on a GPU: the same run as on the CPU. `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import pytest
import torch

from tests.distributed import runs
from torchtitan.models.attend import Attend, build_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize(
    "arguments",
    [(), ("--training.document_mask",), ("--model.handlers=compile",)],
    ids=["plain", "document mask", "compiled"],
)
def test_losses_of_the_cpu(arguments: tuple[str, ...], tmp_path: Path) -> None:
    common = ("--checkpoint.enable=false", "--training.seq_len=128", *arguments)
    runs.run(tmp_path / "cpu", "--job.device=cpu", *common)
    runs.run(tmp_path / "cuda", "--job.device=cuda", *common)
    for (_, loss, norm), expected in zip(
        runs.curve(tmp_path / "cuda"), runs.curve(tmp_path / "cpu"), strict=True
    ):
        assert loss == pytest.approx(expected[1], rel=1e-4)
        assert norm == pytest.approx(expected[2], rel=1e-3)


def test_kernel_of_packed_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 256, 64)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k, v = k[:, :2], v[:, :2]
    starts = torch.rand(2, 256, generator=generator) < 0.03
    document_ids = starts.cumsum(1)
    expected, _ = Attend()(q, k, v, build_mask(document_ids))
    out, _ = Attend()(q.cuda(), k.cuda(), v.cuda(), build_mask(document_ids.cuda()))
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-3, atol=2e-3)
