"""SmolLM2-135M-Instruct, a real model, as a Hugging Face folder; see scripts/make_smollm2.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "smollm2"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder, made by the first test that needs it. Tests only read it.

    Where the model cannot be had the test is skipped; in CI it fails.
    """
    if not FOLDER.exists():
        _make(FOLDER)
    return FOLDER


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file from which the folder is made."""
    return Path(_make("--gguf").strip())


@pytest.fixture(scope="session")
def small_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of SmolLM2's heads, tokenizer and template, 6 M parameters.

    For what must be equal, and need not make sense, in a fraction of the time.
    """
    from tests.foreign import args_of, random_weights, write_hf  # takes seconds to import

    folder = tmp_path_factory.mktemp("small") / "smollm2"
    args = args_of(vocab_size=49152, dim=126, head_dim=14, tied_embeddings=True)
    weights = {n: w * (0.1 if w.dim() == 2 else 1) for n, w in random_weights(args).items()}
    write_hf(folder, weights, args)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(smollm2 / name, folder)
    shutil.copy(smollm2 / "chat_template.jinja", folder)
    return folder


def _make(*words: object) -> str:
    """Run the script, once at a time; return what it prints."""
    FOLDER.parent.mkdir(exist_ok=True)
    with FileLock(FOLDER.parent / "smollm2.lock"):
        command = [sys.executable, str(ROOT / "scripts" / "make_smollm2.py"), *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return result.stdout
    reason = f"SmolLM2 cannot be made: {result.stderr.strip().splitlines()[-1:]}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
