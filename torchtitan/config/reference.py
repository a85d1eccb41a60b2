"""Make the reference page of the config from the table of keys."""

from collections.abc import Iterator, Mapping

from torchtitan.config.fields import Key, keys_of, known_keys, known_sections
from torchtitan.config.schema import Section
from torchtitan.config.toml_text import toml_value

_HEAD = """# Every setting

<!-- Made by scripts/make_config_docs.py from the sections in torchtitan/config. Do not edit. -->

A run is described by one TOML file. Every key can also be given on the command line, which wins:
`--training.steps 100`, `--job.new_run`, `--job.no_new_run`, `--model.handlers a,b`. `-` and `_` are
the same there. `torchtitan config show FILE` prints the resolved values and where each came from,
`torchtitan config schema` a JSON schema for editors, and `torchtitan train FILE --check` says
whether the run could start, for the number of processes in `WORLD_SIZE` (1 when unset), without
looking at this machine's hardware (`--check full` does).

Two keys may stand above the first section: `base = "llama3_8b"` starts from the settings of a
shipped config or of another file, and `unset = ["model.tokenizer_path"]` leaves out what that sets;
see [one file from another](../guides/launching.md#one-file-from-another).

Unknown keys, wrong types and values out of range are errors; all of them are reported at once.
`unset` means that the key has no value unless it is given. Older keys of TorchTitan's work, too;
[from TorchTitan](../start/from_torchtitan.md) has them.
"""

KINDS = {
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "str": "text",
    "strings": "list of texts",
    "lists": "list of lists of texts",
    "table": "table",
    "tables": "list of tables",
}
"""Kinds of values as a reader calls them."""

NAMED_TABLES = ("handlers", "sinks")
"""Free-form tables with a table for each name."""

Models = Mapping[str, type[Section]]


def reference_page(free_tables: Mapping[str, Models]) -> str:
    """Return docs/reference/settings.md.

    `free_tables`: by the free-form table (`model.args`, `handlers`) and the name of the family or
    the handler, the section that the table is checked with.
    """
    return "\n".join([_HEAD, *_sections(free_tables)]).rstrip() + "\n"


def _sections(free_tables: Mapping[str, Models]) -> Iterator[str]:
    for section, doc in known_sections().items():
        if section in NAMED_TABLES:
            yield f"## [{section}.NAME]\n\n{_one_line(doc)}\n"
            for name, settings in free_tables[section].items():
                yield f"### [{section}.{name}]\n"
                yield _table(keys_of(settings))
            continue
        if section in free_tables:
            models = free_tables[section]
            for args in dict.fromkeys(models.values()):
                sharing = ", ".join(name for name, other in models.items() if other is args)
                yield f"## [{section}] of {sharing}\n\n{_one_line(doc)}\n"
                # The defaults of hyper-parameters are the flavor's.
                yield _table(keys_of(args), defaults=section != "model.args")
            if not models:
                yield f"## [{section}]\n\n{_one_line(doc)}\n"
            continue
        yield f"## [{section}]\n\n{_one_line(doc)}\n"
        keys = [key for key in known_keys().values() if key.section == section]
        yield _table(keys)
        for key in keys:
            if key.item is not None:
                yield f"Each table of `{key.last_name}` has:\n"
                yield _table(keys_of(key.item))


def _table(keys: list[Key], defaults: bool = True) -> str:
    """Return a row for each key; defaults of hyper-parameters are the flavor's."""
    if not defaults:
        rows = ["| key | value | |", "|---|---|---|"]
        rows += [f"| `{key.last_name}` | {_values(key)} | {_cell(key.doc)} |" for key in keys]
        return "\n".join(rows) + "\n"
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key in keys:
        required = key.default is None and not key.optional
        default = "required" if required else _code(toml_value(key.default))
        rows.append(f"| `{key.last_name}` | {_values(key)} | {default} | {_cell(key.doc)} |")
    return "\n".join(rows) + "\n"


def _values(key: Key) -> str:
    if key.choices:
        return ", ".join(f'`"{choice}"`' for choice in key.choices)
    bounds = f" {key.bounds}" if key.bounds else ""
    return KINDS[key.kind] + bounds


def _code(text: str) -> str:
    return text if text == "unset" else f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
