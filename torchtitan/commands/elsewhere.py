"""Commands of other tools, and what to type here instead."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from torchtitan.config.shipped import is_config

_TRAIN = "`torchtitan train FILE`"
_MESH = "; on N GPUs `torchrun --nproc_per_node N -m torchtitan train FILE`"
_CHOOSE = "`torchtitan list configs` prints more"
_FINETUNE = f"`torchtitan train finetune_llama3_8b`; {_CHOOSE}"
_ADAPTERS = f"`torchtitan train finetune_llama3_8b_lora`; {_CHOOSE}"
_COPY = f"`torchtitan config copy FILE NEW.toml`; {_CHOOSE}"
_COPIED = "llama3_8b"
_CONVERT, _DIFF = (
    "`torchtitan convert IN OUT`",
    "`torchtitan config diff A B`, or `torchtitan checkpoint diff A B`",
)
_MERGE = "`torchtitan export STEP OUT --merge`"
_EVALUATE = "`torchtitan evaluate CHECKPOINT --tasks NAME`"
_GENERATE = "`torchtitan generate CHECKPOINT PROMPT`"
_TOKENIZE = "`torchtitan tokenize FILE --output DIR`"
_DOWNLOAD = "`torchtitan download OWNER/NAME`"
_WATCH = "`torchtitan status RUN`, `torchtitan plot RUN`, or `tensorboard --logdir RUN/tb`"
_SERVE = "`torchtitan export STEP OUT`, and `vllm serve OUT`"
_QUANTIZE = (
    "`torchtitan export STEP OUT.gguf`, and llama.cpp's `llama-quantize`; to train in float8, int8"
    " or 4 bits, a handler of `torchtitan list handlers`"
)
INSTEAD = {
    # torchtune's `tune`
    "cat": "`torchtitan config show FILE`",
    "cp": _COPY,
    "ls": "`torchtitan list configs`",
    "run": _TRAIN + _MESH,
    "validate": "`torchtitan train FILE --check`",
    # litgpt's
    "convert_from_litgpt": "`torchtitan export STEP OUT`",
    "convert_pretrained_checkpoint": _CONVERT,
    "convert_to_litgpt": _CONVERT,
    "finetune": _FINETUNE,
    "finetune_adapter": _ADAPTERS,
    "finetune_full": _FINETUNE,
    "finetune_lora": _ADAPTERS,
    "merge_lora": _MERGE,
    "pretrain": f"`torchtitan train llama3_8b`; {_CHOOSE}",
    "serve": _SERVE,
    # of transformers, accelerate, trl, axolotl, Lightning
    "dpo": '`torchtitan train FILE`, with loss.name = "dpo" (docs/guides/losses.md)',
    "env": "`torchtitan doctor`",
    "estimate_memory": "`torchtitan train FILE --comm.mode fake_backend`, a dry run",
    "fetch": _DOWNLOAD,
    "fit": _TRAIN,
    "inference": _GENERATE,
    "launch": _TRAIN + _MESH,
    "lm_eval": _EVALUATE,
    "predict": _GENERATE,
    "preprocess": _TOKENIZE,
    "sft": _FINETUNE,
    "test": _EVALUATE,
    "vllm_serve": _SERVE,
    # and what one would try
    "benchmark": "`torchtitan doctor`, which measures the machine",
    "compare": _DIFF,
    "diff": _DIFF,
    "eval": _EVALUATE,
    "info": "`torchtitan doctor`, or `torchtitan inspect CHECKPOINT`",
    "init": _COPY,
    "logs": _WATCH,
    "merge": _MERGE,
    "new": _COPY,
    "prepare": _TOKENIZE,
    "prune": "`torchtitan checkpoint prune RUN`",
    "pull": _DOWNLOAD,
    "push": "`torchtitan upload FOLDER OWNER/NAME`",
    "quantise": _QUANTIZE,
    "quantize": _QUANTIZE,
    "resume": f"{_TRAIN} again: the same command resumes a run",
    "sample": _GENERATE,
    "start": _TRAIN,
    "stop": "`touch RUN/stop`: the run saves after its step, and ends",
    "tensorboard": "`tensorboard --logdir RUN/tb`",
    "verify": "`torchtitan checkpoint verify RUN`",
}
"""Commands to type in place of words that are commands elsewhere; `-` is written `_`."""
_RECIPES = {
    "qlora": "finetune_llama3_8b_qlora",
    "lora": "finetune_llama3_8b_lora",
    "full": "finetune_llama3_8b",
}
"""Shipped configs to start from in place of torchtune's recipes, by a part of their names."""
_LISTS = ("configs", "datasets", "handlers", "losses", "masks", "models", "optimizers", "sinks")


def elsewhere(words: Sequence[str]) -> str | None:
    """Return the fix for a command line whose first word is no command, or None.

    A config among the other words takes the place of FILE, or one like torchtune's recipe.
    """
    word, *rest = words
    if is_config(word) or (word.startswith("--") and "." in word.partition("=")[0]):
        return f"write `{shlex.join(['torchtitan', 'train', *words])}`"
    name = word.lower().replace("-", "_")
    if name in _LISTS:
        return f"write `torchtitan list {name}`"
    if name not in INSTEAD:
        return None
    fix = INSTEAD[name]
    copies = fix == _COPY
    recipe = next((start for part, start in _RECIPES.items() if part in " ".join(rest).lower()), "")
    default = recipe or (_COPIED if copies else "FILE")
    file = next(filter(is_config, rest[:1] if copies else rest), default)
    if copies and len(rest) > 1:
        new = Path(rest[1]).with_suffix(".toml") if rest[1].endswith((".yaml", ".yml")) else rest[1]
        fix = fix.replace("NEW.toml", shlex.quote(str(new)))
    return f"use {fix.replace('FILE', shlex.quote(file))}"
