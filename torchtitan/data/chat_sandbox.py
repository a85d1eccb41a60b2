"""The sandbox of chat templates: Jinja's, with an end to loops, recursion and growth.

Jinja's own keeps a template away from the machine and from large ranges. A template could still
nest loops, call itself twice each time, or double a text, and a run would stand still without a
word.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_STEPS = 1_000_000
"""Calls and turns of loops in a rendering. Templates take a few for each message."""
MOST_SIZE = 10_000_000
"""Characters, elements, or bits of a number, that `+`, `*` and `**` may make."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment; set `steps` to 0 before a rendering."""

    intercepted_binops = frozenset(["+", "*", "**"])
    steps = 0
    turn = object()
    """Called in each turn of a loop, to be counted."""

    def call(self, *words: Any, **named: Any) -> Any:
        """Make a call of the template's, and count it. Raises ValueError after too many."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise ValueError(f"it takes more than {MOST_STEPS:,} steps")
        return None if words[1] is self.turn else super().call(*words, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `+`, `*` or `**`. Raises ValueError if the result would be too large."""
        if operator == "+":  # in every message, so it is to be fast
            value = left + right
            size = len(value) if isinstance(value, str) else _size(value)
        else:
            size = (_size_of_product if operator == "*" else _size_of_power)(left, right)
        if size > MOST_SIZE:
            raise ValueError(f"it makes a value of more than {MOST_SIZE:,} characters")
        return value if operator == "+" else super().call_binop(context, operator, left, right)

    def _parse(self, *source: Any) -> nodes.Template:
        tree = super()._parse(*source)
        turn = nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(turn).set_lineno(loop.lineno))
            if loop.test is not None:  # of elements that are left out, too
                loop.test = nodes.And(nodes.Not(turn), loop.test)
        tree.set_environment(self)
        return tree


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, Sequence) else 0


def _size_of_product(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return _size(left) + _size(right)
    times = left if isinstance(left, int) else right
    return _size(right if times is left else left) * times if isinstance(times, int) else 0


def _size_of_power(left: Any, right: Any) -> int:
    return _size(left) * right if isinstance(right, int) else 0
