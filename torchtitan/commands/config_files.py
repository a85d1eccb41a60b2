"""`torchtitan config copy | convert`."""

import sys
from pathlib import Path

import tomli_w

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.fields import known_sections
from torchtitan.config.load import LoadedConfig, load_config
from torchtitan.config.paths import expand_path
from torchtitan.config.shipped import CLONE, FOLDER, shipped_configs
from torchtitan.config.suggest import did_you_mean


def description(path: Path) -> str:
    """What a shipped TOML is for, from its first comment."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# for "):
            return line.removeprefix("# ")
    return ""


def copy(name: str, file: str) -> int:
    """Write a copy of the shipped TOML `name` to `file`, which must not exist."""
    known = shipped_configs()
    if not known:
        problem = (
            f"{CLONE / FOLDER} does not exist, and the installation lists no configs of its own"
        )
        raise ConfigError(
            ConfigIssue("config copy", problem, "install from a clone: pip install .")
        )
    stem = name.removesuffix(".toml")
    if stem not in known:
        fix = did_you_mean(stem, known)
        raise ConfigError(ConfigIssue(f"config copy {name}", "is no config of this library", fix))
    target = Path(expand_path(file))
    target = target / f"{stem}.toml" if target.is_dir() else target
    text = known[stem].read_text(encoding="utf-8")
    # Its comments say how to start it, by its name.
    _write(target, text.replace(f"{FOLDER}/{stem}.toml", str(target)))
    start = f"torchtitan train {target}"
    if (CLONE / "run_llama_train.sh").is_file():
        start = f"CONFIG_FILE={target} ./run_llama_train.sh"
    print(f"wrote {target}; start it with\n  {start}")
    return 0


def convert(old: str, new: str | None) -> int:
    """Write the TOML `old`, of any release, with today's keys: to the file `new`, or to stdout."""
    loaded = load_config(["--job.config_file", old])
    for notice in loaded.notices:
        print(f"notice: {notice}", file=sys.stderr)
    text = _today(loaded, old)
    if new is None:
        print(text, end="")
    else:
        target = Path(expand_path(new))
        target = target / Path(old).name if target.is_dir() else target
        _write(target, text)
        print(f"wrote {target}; comments were not carried over")
    return 0


def _today(loaded: LoadedConfig, old: str) -> str:
    """What the file sets, and no more, in the order of the sections."""
    given = {name: table for name, table in loaded.given.items() if table}
    job = {key: value for key, value in given.get("job", {}).items() if key != "config_file"}
    given["job"] = job
    ordered = {name: given[name] for name in known_sections() if given.get(name)}
    comment = (
        f"# {Path(old).name} with today's keys, by `torchtitan config convert`; its comments are"
    )
    return f"{comment}\n# not carried over\n\n{tomli_w.dumps(ordered)}"


def _write(path: Path, text: str) -> None:
    """Write a file that must not exist yet."""
    file = None
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        fix = "choose another name, or remove that file first"
        raise ConfigError(ConfigIssue(str(path), "exists already", fix)) from None
    except OSError as error:
        if file is not None:  # a part of a TOML is none, and would be in the way of the next try
            path.unlink(missing_ok=True)
        fix = "write to a folder that exists and is yours"
        problem = f"cannot be written: {error.strerror}"
        raise ConfigError(ConfigIssue(str(path), problem, fix)) from None
