"""The TOMLs that come with the library, which a command line may call by name."""

import glob
from importlib import metadata
from pathlib import Path

import torchtitan
from torchtitan.config.paths import expand_path

CLONE = Path(torchtitan.__file__).parents[1]
"""The clone that this package lies in; where it was installed, the folder of packages."""
FOLDER = "train_configs"


def shipped_configs() -> dict[str, Path]:
    """The files of `train_configs/` by name: those of the clone, or else of the installation."""
    paths = sorted((CLONE / FOLDER).glob("*.toml")) or sorted(_installed())
    return {path.stem: path for path in paths}


def config_path(text: str) -> Path:
    """Return the file that a command line names: a path, or else the name of a shipped config."""
    path = Path(expand_path(text))
    if path.name != text or path.exists():
        return path
    return shipped_configs().get(text, path)


def found_elsewhere(text: str, config_file: str | None = None) -> Path | None:
    """Return what a relative path, or glob, names that is absent in the current folder and there in
    the clone, or in the folder of the config that names it; None if there is none."""
    folders = [CLONE] if (CLONE / FOLDER).is_dir() else []
    folders += [Path(config_file).absolute().parent] if config_file else []
    if not text or Path(text).is_absolute() or _is_there(Path(text)):
        return None
    return next((folder / text for folder in folders if _is_there(folder / text)), None)


def _is_there(path: Path) -> bool:
    return path.exists() or any(True for _ in glob.iglob(str(path)))


def _installed() -> list[Path]:
    """Where the installer has put them, which depends on how it was called."""
    try:
        files = metadata.files("torchtitan") or []
    except metadata.PackageNotFoundError:
        return []
    found = [file for file in files if file.parent.name == FOLDER and file.suffix == ".toml"]
    paths = [Path(str(file.locate())).resolve() for file in found]
    return [path for path in paths if path.is_file()]
