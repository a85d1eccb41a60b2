"""`torchtitan generate`: prompts, from the command line or a file, continued by any checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torchtitan.api import prompts
from torchtitan.api.prompts import Request, check_requests
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path
from torchtitan.utils.host import prepare_host
from torchtitan.utils.text import plural

if TYPE_CHECKING:
    from torchtitan.commands.model_session import ModelSession
    from torchtitan.generation.generate import Completion, Limits, Prompt
    from torchtitan.generation.sampling import SamplingParams


def run(options: argparse.Namespace) -> int:
    """Check everything that needs no weights, then generate; exit status 0."""
    requests = read_requests(options)
    prepare_host()
    from torchtitan.commands import model_session

    params = model_session.sampling_of(options)
    place, found = model_session.look_at(options, params.problems())
    template = prompts.template_of(found, requests)
    ends = [] if template is None else [template.end_of_turn(found.tokenizer)]
    limits = model_session.limits_of(options, found, *ends)
    work = list(zip(requests, prompts.encode(found, requests, template), strict=True))
    with ExitStack() as stack:
        session = stack.enter_context(model_session.open_session(options, found, place))
        output = sys.stdout if options.output == "-" else None
        if options.output not in (None, "-") and place.rank == 0:
            output = stack.enter_context(_new_file(Path(expand_path(options.output))))
        _generate(options, session, work, limits, params, output)
    return DONE


def read_requests(options: argparse.Namespace) -> list[Request]:
    """Return the prompts of the command line and of --input. Raises ConfigError; needs no torch."""
    requests = []
    is_chat = options.chat or options.system is not None
    if is_chat and options.input is not None:
        fix = 'write "messages" instead of "prompt" into its lines'
        raise ConfigError(ConfigIssue("--chat", "does not apply to --input", fix))
    for number, text in enumerate(options.prompts, start=1):
        where = f"PROMPT {number}" if len(options.prompts) > 1 else "PROMPT"
        fields: dict[str, Any] = {"prompt": text}
        if is_chat:
            system = [] if options.system is None else [("system", options.system)]
            turns = [*system, ("user", text)]
            fields = {"messages": [{"role": role, "content": c} for role, c in turns]}
        requests.append(Request(where, fields))
    if options.input is not None:
        requests += _lines_of(Path(expand_path(options.input)))
    elif not requests:
        fix = 'write `torchtitan generate CHECKPOINT "a text"`, or give --input FILE.jsonl'
        raise ConfigError(ConfigIssue("PROMPT", "is missing", fix))
    check_requests(requests)
    return requests


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """Open a file that gets its name when complete; what a killed command left is replaced."""
    partial = path.with_name(path.name + ".part")
    if partial.exists():
        print(f"notice: {partial}, left by a command that was ended, is replaced", file=sys.stderr)
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.rename(path)


def _lines_of(file: Path) -> list[Request]:
    requests = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    requests.append(Request(f"{file}:{number}", json.loads(line)))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise ConfigError(ConfigIssue("--input", problem, "name a file", str(file))) from None
    except (ValueError, RecursionError) as error:
        text, fix = f"is not JSON: {error}", "write an object a line, in UTF-8"
        raise ConfigError(ConfigIssue(f"{file}:{number}", text, fix)) from None
    if not requests:
        fix = 'write a line such as {"prompt": "a text"}'
        raise ConfigError(ConfigIssue("--input", "holds no prompt", fix, str(file)))
    return requests


def _generate(
    options: argparse.Namespace,
    session: ModelSession,
    work: list[tuple[Request, Prompt]],
    limits: Limits,
    params: SamplingParams,
    output: TextIO | None,
) -> None:
    """Continue all prompts, a batch on every data rank at once; rank 0 prints or writes them."""
    world, dims = session.world, session.dims
    streams = len(work) == 1 and options.output is None
    start, num_tokens = time.perf_counter(), 0
    for begin in range(0, len(work), options.batch_size * dims.dp):
        batch = work[begin : begin + options.batch_size * dims.dp]
        mine = [prompt for _, prompt in batch[dims.dp_rank(world.rank) :: dims.dp]]
        completions: list[Completion] = []
        if mine or dims.dp_shard > 1:  # who has no prompts gathers weights for the others
            on_text = _print_piece if streams and world.is_main else None
            completions = session.generator.generate(mine, limits, params, on_text)
        everywhere = world.gather_json([vars(completion) for completion in completions])
        by_number = {each["number"]: each for rank in everywhere for each in rank}
        for request, prompt in batch:
            completion = by_number[prompt.number]
            num_tokens += len(completion["ids"])
            if world.is_main and output is not None:
                line = json.dumps(_result(request, prompt, completion), ensure_ascii=False)
                print(line, file=output, flush=True)
            elif world.is_main:
                print("" if streams else f"> {_shown(request)}\n{completion['text']}\n", flush=True)
        if world.is_main and len(work) > len(batch):
            print(f"{begin + len(batch)} of {len(work)} prompts", file=sys.stderr)
    if world.is_main:
        seconds = time.perf_counter() - start
        rate = f"{num_tokens / seconds:.1f} tokens/s"
        print(f"{plural(num_tokens, 'token')} in {seconds:.1f} s ({rate})", file=sys.stderr)


def _print_piece(number: int, text: str) -> None:
    print(text, end="", flush=True)


def _shown(request: Request) -> str:
    messages = request.fields.get("messages")
    text = messages[-1]["content"] if messages else request.fields["prompt"]
    return str(text).replace("\n", "\n> ")


def _result(request: Request, prompt: Prompt, completion: dict[str, Any]) -> dict[str, Any]:
    return request.fields | {
        "completion": completion["text"],
        "finish_reason": completion["finish_reason"],
        "prompt_tokens": len(prompt.ids),
        "completion_tokens": len(completion["ids"]),
    }
