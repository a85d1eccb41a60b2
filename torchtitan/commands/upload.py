"""`torchtitan upload`: a folder to the Hugging Face hub."""

import argparse
from pathlib import Path

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path
from torchtitan.weights.hub import Asked


def run(options: argparse.Namespace) -> int:
    """Make the repository if there is none, and upload; exit status 0. Raises ConfigError."""
    folder = Path(expand_path(options.folder))
    if not folder.is_dir() or not any(folder.iterdir()):
        text = "is not a folder with files"
        raise ConfigError(ConfigIssue("FOLDER", text, "name an export's folder", str(folder)))
    from huggingface_hub import create_repo, upload_folder

    keys = ("OWNER/NAME", "--revision", "FOLDER")
    asked = Asked(options.repo_id, options.revision, None, *keys)
    private = None if options.public else True
    asked.ask(lambda where: create_repo(where["repo_id"], private=private, exist_ok=True))
    message = options.message or f"Upload {folder.name}"
    commit = asked.ask(
        lambda where: upload_folder(folder_path=folder, commit_message=message, **where)
    )
    print(commit.commit_url)
    return DONE
