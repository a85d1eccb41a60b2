"""Measure low precision and write its tables into docs/guides/low_precision.md:
python scripts/make_low_precision.py

Trains the debug model in short sequences, in bfloat16 and in each format, and compares gradients
with those of float32. Takes some minutes on one CPU core; needs the extra `quant`.
"""

import datetime
import platform
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.distributed.low_precision import (  # noqa: E402
    CURVE_STEPS,
    VARIANTS,
    Curve,
    curve,
    gradient_errors,
)
from tests.pool import GlooPool  # noqa: E402
from torchtitan import __version__  # noqa: E402

PAGE = ROOT / "docs" / "guides" / "low_precision.md"


def main() -> None:
    """Every variant, on one process."""
    pool = GlooPool()
    try:
        [errors] = pool.run(1, gradient_errors, timeout=600)
        names = [None, *VARIANTS]
        curves: dict[str | None, Curve] = {}
        for name in names:
            [curves[name]] = pool.run(1, curve, name, timeout=1800)
            print(f"{name or 'bfloat16'}: {curves[name].last:.4f}", flush=True)
    finally:
        pool.close()
    head = f"linears | loss after {CURVE_STEPS} steps | against bfloat16"
    rows = [
        f"| {head} | error of all gradients | of one matrix, at most |",
        "|---|---:|---:|---:|---:|",
    ]
    plain = curves[None].last
    for name in names:
        last, error = curves[name].last, errors[name or "bfloat16"]
        against = "" if name is None else f"{100 * (last / plain - 1):+.2f} %"
        shown = "bfloat16" if name is None else _in_words(name)
        rows.append(f"| {shown} | {last:.4f} | {against} | {error.all:.4f} | {error.worst:.4f} |")
    made = (
        f"Made on {datetime.date.today()} with torchtitan {__version__}, PyTorch"
        f" {torch.__version__}, torchao {_torchao()}, on the CPU ({platform.machine()})."
    )
    text = PAGE.read_text(encoding="utf-8")
    pattern = r"(<!-- measured:[^\n]*-->\n).*?(<!-- end -->)"
    table = "\n".join([*rows, "", made, ""])
    text = re.sub(pattern, lambda found: f"{found[1]}{table}{found[2]}", text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")
    print("\n".join(rows))
    print(f"wrote {PAGE}")


def _in_words(name: str) -> str:
    handler = VARIANTS[name][0]
    return ", ".join(filter(None, [f"`{handler}`", name.removeprefix(handler).strip()]))


def _torchao() -> str:
    from importlib.metadata import version

    return version("torchao")


if __name__ == "__main__":
    main()
