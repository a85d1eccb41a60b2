"""Find the messages that the library can print, for docs/reference/messages.md, which
python scripts/make_reference.py writes.

Reads the source: what issues, errors and the log are given, with names followed to the strings that
they stand for. What is only known when it runs is `…`.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

UNKNOWN = "…"
MOST = 12
"""Wordings of one message; more are not told apart."""
ERROR, WARNING, NOTICE, PART = "error: ", "warning: ", "notice: ", f"{UNKNOWN} "
LOG_KINDS = {"info": NOTICE, "warning": WARNING, "error": ERROR, "exception": ERROR}
NOT_PRINTED = ("AssertionError", "Command", "Library")
"""Callables whose texts a user does not see, or sees in the help."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Message(NamedTuple):
    kind: str
    text: str
    fix: str


class Call(NamedTuple):
    """A call that takes a message: its arguments for the key, the text and the fix, by name."""

    kind: str
    key: ast.expr | None
    text: ast.expr
    fix: ast.expr | None
    function: Function | None


@dataclass
class Module:
    name: str
    tree: ast.Module
    calls: list[Call] = field(default_factory=list)

    @property
    def doc(self) -> str:
        return (ast.get_docstring(self.tree) or "").partition("\n\n")[0].replace("\n", " ")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def all_calls(self) -> list[ast.Call]:
        return [node for node in self.nodes if isinstance(node, ast.Call)]

    @cached_property
    def functions(self) -> dict[str, Function]:
        return {node.name: node for node in self.nodes if isinstance(node, Function)}

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    found.update(_bound(target, node.value))
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        return {
            alias.asname or alias.name: (node.module, alias.name)
            for node in self.nodes
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }

    @cached_property
    def function_of(self) -> dict[ast.AST, Function]:
        """The innermost function around each node."""
        found: dict[ast.AST, Function] = {}
        for function in self.nodes:
            if isinstance(function, Function):  # outer ones come first
                found.update(dict.fromkeys(list(ast.walk(function))[1:], function))
        return found


class Reader:
    """All modules of the library, and what their expressions stand for."""

    def __init__(self, library: Path):
        self.modules = {}
        for path in sorted(library.rglob("*.py")):
            name = ".".join(path.relative_to(library.parent).with_suffix("").parts)
            name = name.removesuffix(".__init__")
            self.modules[name] = Module(name, ast.parse(path.read_text(encoding="utf-8")))
        self.errors = self._errors()
        for module in self.modules.values():
            module.calls = list(self._calls(module))

    def messages(self, module: Module) -> list[Message]:
        """The messages of a module in the order of its lines, each once."""
        found = {}
        for call in sorted(module.calls, key=lambda call: call.text.lineno):
            texts = self.texts(call.text, module, call.function)
            keys = self.texts(call.key, module, call.function) if call.key else [""]
            fixes = self.texts(call.fix, module, call.function) if call.fix else [""]
            key = f"{keys[0]}: " if keys[0] not in ("", UNKNOWN) else ""
            key = re.sub(r"^([^…]+): ", r"`\1`: ", key)
            fix = " / ".join(dict.fromkeys(fix for fix in fixes if _says_something(fix)))
            for text in filter(_says_something, texts):
                problem, _, own_fix = text.partition(". Fix: ")
                found[Message(call.kind, key + problem, fix or own_fix)] = None
        return [*found, *self._parts(module, found)]

    def _parts(self, module: Module, found: Iterable[Message]) -> Iterator[Message]:
        """Sentences of the source that are in no message found, because they are handed on."""
        known = "\n".join(f"{message.text}\n{message.fix}" for message in found)
        for node in _sentences(module.tree):
            texts = _without_codes(self.texts(node, module, module.function_of.get(node)))
            for part in ". Fix: ".join(texts).split(". Fix: "):
                text = part.strip(f" ;:,.{UNKNOWN}")
                if len(re.findall(r"(?<!\S)[A-Za-z]+(?!\S)", text)) > 3 and text not in known:
                    known += f"\n{text}"
                    yield Message(PART, text, "")

    def _errors(self) -> set[str]:
        """Names of exceptions: Python's, and classes of the library that inherit from one."""
        bases = {
            node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
            for module in self.modules.values()
            for node in module.nodes
            if isinstance(node, ast.ClassDef)
        }
        known = {
            name
            for name, thing in vars(builtins).items()
            if isinstance(thing, type) and issubclass(thing, BaseException)
        }
        while more := {name for name, own in bases.items() if own & known} - known:
            known |= more
        return known - {"AssertionError", "KeyError", "StopIteration", "ConfigError"}

    def _calls(self, module: Module) -> Iterator[Call]:
        for node in module.all_calls:
            function = module.function_of.get(node)
            for call in self._messages_of(node, function):
                yield call
                yield from self._passed_on(module, call, depth=2)

    def _messages_of(self, node: ast.Call, function: Function | None) -> Iterator[Call]:
        named = {word.arg: word.value for word in node.keywords}
        arguments = dict(enumerate(node.args))
        name = _name_of(node.func)
        if name in ("ConfigIssue", "warning") and len(node.args) + len(named) >= 3:
            key, text, fix = (
                arguments.get(place, named.get(word))
                for place, word in enumerate(("key", "problem", "fix"))
            )
            severity = named.get("severity")
            is_warning = name == "warning" or getattr(severity, "value", "") == "warning"
            if text is not None and not _is_logger(node.func):
                kind = WARNING if is_warning else ERROR
                yield Call(kind, key, text, fix, function)
                return
        if _is_logger(node.func) and name in LOG_KINDS and node.args:
            text = ast.BinOp(node.args[0], ast.Mod(), ast.Tuple(node.args[1:]))
            yield Call(LOG_KINDS[name], None, ast.copy_location(text, node), None, function)
        elif name == "print" and "stderr" in ast.dump(named.get("file", node.func)) and node.args:
            yield Call(NOTICE, None, node.args[0], None, function)
        elif name in self.errors and node.args:
            fix = arguments.get(1) if name == "TokenFileError" else None
            yield Call(ERROR, None, node.args[0], fix, function)

    def _passed_on(self, module: Module, call: Call, depth: int) -> Iterator[Call]:
        """The calls of a function that is given the text or the fix, or parts of them."""
        function = call.function
        if function is None or not depth:
            return
        parameters = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
        is_method = parameters[:1] in (["self"], ["cls"])
        parts = [part for part in (call.key, call.text, call.fix) if part is not None]
        used = {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}
        if not used & set(parameters[is_method:]):
            return
        for node in module.all_calls:
            if _name_of(node.func) == function.name:
                places = (
                    parameters[is_method:] if isinstance(node.func, ast.Attribute) else parameters
                )
                given = dict(zip(places, node.args))
                given |= {word.arg: word.value for word in node.keywords if word.arg}
                if not any(_has_words(given[name]) for name in used & given.keys()):
                    continue
                key, text, fix = (
                    part and ast.copy_location(_Replace(given).visit(_copy(part)), node)
                    for part in (call.key, call.text, call.fix)
                )
                outer = Call(call.kind, key, text, fix, module.function_of.get(node))
                yield outer
                yield from self._passed_on(module, outer, depth - 1)

    def texts(
        self, node: ast.AST | None, module: Module, function: Function | None, depth: int = 6
    ) -> list[str]:
        """The wordings of an expression."""
        if depth == 0:
            return [UNKNOWN]
        found = [_squeezed(text) for text in self._texts(node, module, function, depth - 1)]
        found = list(dict.fromkeys(found))
        return found if 0 < len(found) <= MOST else [UNKNOWN]

    def _texts(
        self, node: ast.AST | None, module: Module, function: Function | None, depth: int
    ) -> list[str]:
        def inner(part: ast.AST) -> list[str]:
            return self.texts(part, module, function, depth)

        match node:
            case ast.Constant(value=value) if value is not None:
                return [str(value)]
            case ast.JoinedStr(values=parts):
                return ["".join(choice) for choice in product(*map(inner, parts))]
            case ast.FormattedValue(value=value):
                return inner(value) if not isinstance(value, ast.Call) else [UNKNOWN]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [a + b for a, b in product(inner(left), inner(right))]
            case ast.BinOp(left=left, op=ast.Mod(), right=ast.Tuple(elts=[only])):
                whole = inner(left)
                return inner(only) if whole == ["%s"] else _without_codes(whole)
            case ast.BinOp(left=left, op=ast.Mod()):
                return _without_codes(inner(left))
            case ast.IfExp(body=body, orelse=orelse):
                return inner(body) + inner(orelse)
            case ast.BoolOp(op=ast.Or(), values=values):
                return [text for value in values for text in inner(value)]
            case ast.Name(id=name):
                return self._named(name, node, module, function, depth)
            case ast.Call(func=ast.Attribute(value=value, attr="format")):
                return [re.sub(r"\{[^{}]*\}", UNKNOWN, text) for text in inner(value)]
            case ast.Call(func=ast.Name(id="str"), args=[only]):
                return inner(only)
            case ast.Call(func=ast.Name(id=name)):
                return self._returned(name, module, depth)
        return [UNKNOWN]

    def _named(
        self, name: str, node: ast.AST, module: Module, function: Function | None, depth: int
    ) -> list[str]:
        assigned = _assigned(name, node, function) if function else []
        if assigned:
            return [t for value in assigned for t in self.texts(value, module, function, depth)]
        parameters = ast.walk(function.args) if function else ()
        if any(isinstance(one, ast.arg) and one.arg == name for one in parameters):
            return [UNKNOWN]
        if name in module.constants:
            return self.texts(module.constants[name], module, None, depth)
        source, other = module.imports.get(name, ("", ""))
        if source in self.modules and other in self.modules[source].constants:
            there = self.modules[source]
            return self.texts(there.constants[other], there, None, depth)
        return [UNKNOWN]

    def _returned(self, name: str, module: Module, depth: int) -> list[str]:
        source, other = module.imports.get(name, (module.name, name))
        there = self.modules.get(source)
        if there is None or other not in there.functions:
            return [UNKNOWN]
        function = there.functions[other]
        own = [n for n, f in there.function_of.items() if f is function]
        returns = [node.value for node in own if isinstance(node, ast.Return) and node.value]
        return [text for value in returns for text in self.texts(value, there, function, depth)]


class _Replace(ast.NodeTransformer):
    def __init__(self, given: dict[str, ast.expr]):
        self.given = given

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.given.get(node.id, node)


def _copy(node: ast.expr) -> ast.expr:
    copied = ast.parse(ast.unparse(node), mode="eval").body
    for part in ast.walk(copied):
        ast.copy_location(part, node)
    return copied


def _assigned(name: str, use: ast.AST, function: Function) -> list[ast.expr]:
    """The values that a name may have at `use`: of the assignments before it, back to one that
    always happens."""
    before = []
    for block in _blocks(function):
        is_around = block[0].lineno <= use.lineno <= (block[-1].end_lineno or 0)
        for node in block:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    value = _bound(target, node.value).get(name)
                    if value is not None and node.lineno < use.lineno:
                        before.append((node.lineno, is_around, value))
    values: list[ast.expr] = []
    for _, is_around, value in sorted(before, key=lambda found: found[0], reverse=True):
        values.insert(0, value)
        if is_around:
            break
    return values


@cache
def _blocks(function: Function) -> list[list[ast.stmt]]:
    """All lists of statements in a function."""
    fields = ("body", "orelse", "finalbody")
    found = [getattr(node, name, None) for node in ast.walk(function) for name in fields]
    return [block for block in found if isinstance(block, list) and block]


def _bound(target: ast.expr, value: ast.expr) -> dict[str, ast.expr]:
    if isinstance(target, ast.Name):
        return {target.id: value}
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts)
        return {one.id: part for one, part in pairs if isinstance(one, ast.Name)}
    return {}


def _sentences(node: ast.AST) -> Iterator[ast.expr]:
    """The outermost strings below a node, without docstrings, helps, asserts and tables."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Constant | ast.JoinedStr):
            if isinstance(getattr(child, "value", ""), str) and not isinstance(node, ast.Expr):
                yield child
        elif not (
            isinstance(child, ast.Assert)
            or (isinstance(child, ast.keyword) and child.arg in ("help", "description"))
            or (isinstance(node, ast.Module) and isinstance(getattr(child, "value", 0), ast.Dict))
            or (isinstance(child, ast.Call) and _name_of(child.func) in NOT_PRINTED)
        ):
            yield from _sentences(child)


def _name_of(node: ast.expr) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _is_logger(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and _name_of(node.value) in ("logger", "warnings")


def _has_words(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Constant) and " " in str(n.value) for n in ast.walk(node))


def _without_codes(texts: list[str]) -> list[str]:
    return [re.sub(r"%[-.\d]*[a-z]", UNKNOWN, text) for text in texts]


def _squeezed(text: str) -> str:
    return re.sub(rf"{UNKNOWN}[{UNKNOWN}\s]*{UNKNOWN}", UNKNOWN, re.sub(r"\s*\n\s*", " ", text))


def _says_something(text: str) -> bool:
    return len(re.findall(r"[a-z]{2,}", text.replace(UNKNOWN, " "), re.IGNORECASE)) > 1
