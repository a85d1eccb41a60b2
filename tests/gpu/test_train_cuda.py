"""Training on a GPU: the same run as on the CPU. `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import pytest
import torch

from tests.distributed import runs
from torchtitan.models.attention import AttentionMaskBuilder, InnerAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

HEADS = ("--model.args.n_heads=2",)
"""Of 16 channels, the fewest that FlexAttention's kernel takes."""


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--training.document_mask", *HEADS),
        ("--model.handlers=compile",),
        ("--model.args.sliding_window=48", *HEADS),
        (
            "--model.args.sliding_window=48",
            "--training.document_mask",
            "--model.handlers=compile",
            *HEADS,
        ),
    ],
    ids=["plain", "document mask", "compiled", "window", "both masks, compiled"],
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


@pytest.mark.parametrize(
    ("masks", "of_the_model"),
    [
        ((), ()),
        (("--training.document_mask",), ()),
        (("--handlers.flex_attention.window=48",), ("--model.args.sliding_window=48",)),
    ],
    ids=["causal", "documents", "window"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_trains_as_the_cpu_does_without_it(
    masks: tuple[str, ...], of_the_model: tuple[str, ...], compiled: bool, tmp_path: Path
) -> None:
    common = ("--checkpoint.enable=false", "--training.seq_len=128", *HEADS)
    handlers = "flex_attention,compile" if compiled else "flex_attention"
    handler = ("--job.device=cuda", f"--model.handlers={handlers}")
    runs.run(tmp_path / "cuda", *handler, *common, *masks)
    same = of_the_model or masks
    runs.run(tmp_path / "cpu", "--job.device=cpu", *common, *same)
    for (_, loss, norm), expected in zip(
        runs.curve(tmp_path / "cuda"), runs.curve(tmp_path / "cpu"), strict=True
    ):
        assert loss == pytest.approx(expected[1], rel=1e-4)
        assert norm == pytest.approx(expected[2], rel=1e-3)


@pytest.mark.parametrize("window", [None, 1, 100, 256])
@pytest.mark.parametrize("packed", [True, False])
def test_kernel_under_masks(packed: bool, window: int | None) -> None:
    """Outputs and gradients, in float32, of the kernel that is compiled for the masks."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 256, 64)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k, v = k[:, :2], v[:, :2]
    starts = torch.rand(2, 256, generator=generator) < 0.03
    document_ids = starts.cumsum(1) if packed else None
    upstream = torch.randn(shape, generator=generator)
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        ids = None if document_ids is None else document_ids.to(device)
        own = [x.to(device).requires_grad_() for x in (q, k, v)]
        out = InnerAttention()(*own, AttentionMaskBuilder(window).build(ids, 256, device))
        found.append([out, *torch.autograd.grad(out, own, upstream.to(device))])
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=2e-3, atol=2e-3)
