"""Settings of the handler `flex_attention`, and what can be wrong with them. No torch."""

from collections.abc import Iterator
from importlib.util import find_spec

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Names, PositiveInt, Section
from torchtitan.config.suggest import fix_of_registered
from torchtitan.handlers.linear_settings import needs_capability, no_float64
from torchtitan.handlers.mask_registry import CAUSAL, DOCUMENT, MASKS, WINDOW
from torchtitan.models.registry import model_args
from torchtitan.models.spec import ModelArgs

NAME = "flex_attention"
_MASKS_KEY, _WINDOW_KEY = f"handlers.{NAME}.masks", f"handlers.{NAME}.window"
_SMALLEST_HEAD = 16
"""Of the units that multiply matrices, by way of Triton."""


class Settings(Section):
    """What attention may see."""

    masks: Names = ()
    """A token sees what all of these let it: `causal`, `document` (its own document, with
    `training.document_mask`), `sliding_window`, and what is registered. `causal` is in force also
    where it is not listed. Empty: what `training.document_mask` and the window ask for."""

    window: PositiveInt | None = None
    """Of `sliding_window`: a token sees the last so many, itself among them. Unset: the model's
    own, as `model.args.sliding_window`."""


def chosen_masks(settings: Settings, document_mask: bool, window: int | None) -> tuple[str, ...]:
    """The names of what is in force. `window` is what `chosen_window` gives."""
    implied = [DOCUMENT] * document_mask + [WINDOW] * (window is not None)
    return tuple(dict.fromkeys([CAUSAL, *(settings.masks or implied)]))


def chosen_window(settings: Settings, of_model: int | None) -> int | None:
    """The handler's, else the model's."""
    return of_model if settings.window is None else settings.window


def check(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """Problems of the settings with the device, the mesh, the model and each other."""
    if context.device_type != "cuda":
        problem = (
            "FlexAttention is trained on CUDA only, as PyTorch has no backward of it for CPUs,"
            f" and this run is on {context.device_type}"
        )
        fix = (
            "leave it out: training.document_mask and model.args.sliding_window mask the same"
            " without it, on every device"
        )
        yield ConfigIssue("model.handlers", problem, fix, NAME)
    yield from no_float64(context, NAME)
    yield from _mesh(context)
    args = model_args(context.config.model)
    if args is not None:
        yield from _heads(args)
        unknown = list(_unknown(settings))
        yield from unknown or _against(context, settings, args.attention_window())


def _mesh(context: RunContext) -> Iterator[ConfigIssue]:
    section = context.config.parallelism
    method = section.context_parallel_method
    if section.context_parallel_degree > 1 and method != "ulysses":
        problem = (
            f"{method} computes attention in parts that it adds up, by other kernels, and no"
            f" rank sees whole sequences, as the handler {NAME} has to"
        )
        fix = "set it to ulysses, or leave the handler out"
        yield ConfigIssue("parallelism.context_parallel_method", problem, fix, method)


def _heads(args: ModelArgs) -> Iterator[ConfigIssue]:
    heads = args.heads()
    if heads is not None and args.hidden_size() // heads[0] < _SMALLEST_HEAD:
        size = args.hidden_size() // heads[0]
        problem = f"its kernel needs heads of at least {_SMALLEST_HEAD} channels, not {size}"
        yield ConfigIssue("model.handlers", problem, "leave it out, or choose fewer heads", NAME)


def _unknown(settings: Settings) -> Iterator[ConfigIssue]:
    for place, name in enumerate(settings.masks):
        if name in settings.masks[:place]:
            yield ConfigIssue(_MASKS_KEY, "is listed twice", "list it once", name)
            continue
        try:
            known = MASKS.get(name) is not None
        except ConfigError as error:
            yield from error.problems
            continue
        if not known:
            yield ConfigIssue(_MASKS_KEY, "is not a mask", fix_of_registered(name, MASKS), name)


def _against(
    context: RunContext, settings: Settings, of_model: int | None
) -> Iterator[ConfigIssue]:
    """What is listed is what is in force, so it must not differ from what is set elsewhere."""
    masks, window = settings.masks, settings.window
    documents = context.config.training.document_mask
    if DOCUMENT in masks and not documents:
        problem = "training.document_mask = false, and without it no document is known"
        yield ConfigIssue(_MASKS_KEY, problem, "set that to true, or leave it out here", DOCUMENT)
    if masks and documents and DOCUMENT not in masks:
        problem = f"training.document_mask = true asks for {DOCUMENT}, which is not listed"
        yield ConfigIssue(_MASKS_KEY, problem, "list it, or set that to false", list(masks))
    if window is not None and of_model is not None and window != of_model:
        problem = f"the model's own window is {of_model} (model.args.sliding_window)"
        yield ConfigIssue(_WINDOW_KEY, problem, "remove one of the two", window)
    if WINDOW in masks and chosen_window(settings, of_model) is None:
        problem = "of how many tokens?"
        fix = f"set {_WINDOW_KEY}, or model.args.sliding_window, which serves all devices"
        yield ConfigIssue(_MASKS_KEY, problem, fix, WINDOW)
    if masks and WINDOW not in masks:
        asking = (_WINDOW_KEY, window) if window is not None else _of_model(of_model)
        if asking[1] is not None:
            problem = f"{asking[0]} = {asking[1]} asks for {WINDOW}, which is not listed"
            yield ConfigIssue(_MASKS_KEY, problem, "list it, or remove that", list(masks))


def _of_model(window: int | None) -> tuple[str, int | None]:
    return "model.args.sliding_window", window


def probe(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """Whether this machine can compile the kernel."""
    yield from needs_capability(context, NAME, (7, 0), "Volta", "leave it out")
    if find_spec("triton") is None:
        problem = "its kernels are compiled by Triton, which is not installed"
        yield ConfigIssue("model.handlers", problem, "pip install triton, or leave it out", NAME)
