"""Find the TOMLs that come with the library, which a command line may call by name."""

import glob
import os
from importlib import metadata
from pathlib import Path

import torchtitan
from torchtitan.config.paths import expand_path

CLONE = Path(torchtitan.__file__).parents[1]
"""The clone that this package lies in; where it was installed, the folder of packages."""
FOLDER = "train_configs"


def shipped_configs() -> dict[str, Path]:
    """Return the files of `train_configs/` by name, of the clone or else of the installation."""
    paths = sorted((CLONE / FOLDER).glob("*.toml")) or sorted(_installed())
    return {path.stem: path for path in paths}


def config_path(text: str) -> Path:
    """Return the file that a command line names: a path, or else the name of a shipped config."""
    path = Path(expand_path(text))
    if path.name != text or os.path.isfile(path):
        return path
    return shipped_configs().get(text, path)


def base_path(text: str, folder: Path) -> Path:
    """Return the file that a TOML in `folder` is based on: a path from there, or a shipped name."""
    path = folder / expand_path(text)
    if Path(text).name != text or os.path.isfile(path):
        return path
    return shipped_configs().get(text, path)


def is_config(text: str) -> bool:
    """Return whether a word can only mean a config: a TOML file, or the name of a shipped one."""
    is_named = text.endswith(".toml") or text in shipped_configs()
    return is_named or ("/" in text and Path(expand_path(text)).is_file())


def found_elsewhere(text: str, config_file: str | None = None) -> Path | None:
    """Return the file that an absent relative path or glob may mean, or None.

    Searched are the clone and the folder of `config_file`.
    """
    folders = [CLONE] if (CLONE / FOLDER).is_dir() else []
    folders += [Path(config_file).absolute().parent] if config_file else []
    if not text or Path(text).is_absolute() or _is_there(Path(text)):
        return None
    return next((folder / text for folder in folders if _is_there(folder / text)), None)


def _is_there(path: Path) -> bool:
    return path.exists() or any(True for _ in glob.iglob(str(path)))


def _installed() -> list[Path]:
    """Return the TOMLs where the installer has put them."""
    try:
        files = metadata.files("torchtitan") or []
    except metadata.PackageNotFoundError:
        return []
    found = [file for file in files if file.parent.name == FOLDER and file.suffix == ".toml"]
    paths = [Path(str(file.locate())).resolve() for file in found]
    return [path for path in paths if path.is_file()]
