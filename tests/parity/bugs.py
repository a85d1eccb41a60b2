"""Historical mistakes (`BUGS`), and patches that put one back."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tests.distributed.tiny import Case


class Patches(ExitStack):
    """Replaced functions, which are put back at the end."""

    calls = 0
    """Calls of all replacements together."""

    def put(self, owner: Any, name: str, mistake: Callable[..., Any]) -> None:
        """Call `mistake(original, *args)` instead of the function, method or property `name`."""
        original = vars(owner)[name]
        function = original.fget if isinstance(original, property) else original

        @wraps(function)
        def wrong(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return mistake(function, *args, **kwargs)

        setattr(owner, name, property(wrong) if isinstance(original, property) else wrong)
        self.callback(setattr, owner, name, original)


@dataclass(frozen=True)
class Bug:
    """A mistake, and where it shows."""

    put_back: Callable[[Patches], None]
    case: Case


BUGS: dict[str, Bug] = {}


def shows_on(case: Case) -> Callable[[Callable[[Patches], None]], Callable[[Patches], None]]:
    """Register a mistake with a row of the table."""

    def register(put_back: Callable[[Patches], None]) -> Callable[[Patches], None]:
        BUGS[put_back.__name__] = Bug(put_back, case)
        return put_back

    return register


def square_sum(parameters, *_) -> torch.Tensor:
    """The sum of squares of the gradients on this rank."""
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum()
