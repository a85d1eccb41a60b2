"""Checks of `checkpoint.remote_folder`: its form, and that it can be read and written."""

import glob
import secrets
from dataclasses import replace

from torchtitan.checkpoint.remote_start import KEY, remote_issue
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.utils.remote import RemoteError, RemoteFolder, url_problem


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check the setting alone and against others; ask nobody."""
    section = context.config.checkpoint
    url = section.remote_folder
    if url is None:
        return []
    problem = "has a wildcard" if glob.has_magic(url) else url_problem(url)
    if problem:
        return [ConfigIssue(KEY, problem, "write s3://bucket/folder, or gs:// or az://", url)]
    if not section.enable:
        text = "has no effect, because checkpoint.enable is false"
        return [ConfigIssue(KEY, text, "set checkpoint.enable", url)]
    return []


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """List, write and delete something in the folder. Whose it is, the start looks at."""
    url = context.config.checkpoint.remote_folder
    if url is None or context.config.checkpoint.load_only:
        return []
    name = f".access-{secrets.token_hex(4)}"
    try:
        remote = RemoteFolder(url)
        remote.files()
        remote.write(name, b"")
        remote.delete([name])
    except RemoteError as error:
        # The machine that trains may have other credentials than the one that checks.
        return [replace(remote_issue(error, url), missing_asset=True)]
    return []
