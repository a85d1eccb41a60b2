"""What the Hugging Face hub refuses, in words that say what to do about it."""

from torchtitan.config.errors import ConfigIssue
from torchtitan.utils.redaction import HIDDEN, redact

_NETWORKS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose errors mean that no answer came; which one is used depends on the version."""
_LOG_IN = "set HF_TOKEN, or run `hf auth login`"


def hub_problem(
    error: Exception, repo_id: str, revision: str, token: str | None
) -> ConfigIssue | None:
    """The problem that an error of `huggingface_hub` stands for; None for one that is a mistake.

    `token` is what was sent, if anything; it is kept out of the text.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, errors.HFValidationError):
        return ConfigIssue("--repo_id", "is no name of a repository", "write OWNER/NAME", repo_id)
    if isinstance(error, errors.OfflineModeIsEnabled):
        fix = "unset it, or copy the files from a machine that is connected"
        return ConfigIssue("HF_HUB_OFFLINE", "is set, so that nothing is downloaded", fix)
    if isinstance(error, errors.GatedRepoError):
        if token is None:
            problem, fix = "is gated, and there is no token", f"ask for access on {page}; {_LOG_IN}"
        else:
            problem = "is gated, and the token's owner has no access to it"
            fix = f"ask for access on {page}, and wait until it is granted"
        return ConfigIssue("--repo_id", problem, fix, repo_id)
    if isinstance(error, errors.RevisionNotFoundError):
        problem = f"{repo_id} has no branch, tag or commit of this name"
        return ConfigIssue("--revision", problem, "leave it out for `main`", revision)
    if isinstance(error, errors.RepositoryNotFoundError):
        fix = "check the spelling"
        if token is None:
            fix += f"; if it is private, {_LOG_IN}"
        return ConfigIssue("--repo_id", "there is none, or it is private", fix, repo_id)
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, repo_id)
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_of_the_network(error):
        # A token that no header can hold is in the message about that, in whatever form.
        text = redact(str(error.__cause__ or error)).partition("Bearer")[0]
        text = text.replace(token, HIDDEN) if token else text
        fix = "check the network, its proxy (HTTPS_PROXY), and HF_ENDPOINT if it is set"
        return ConfigIssue("download", f"{constants.ENDPOINT} cannot be reached: {text}", fix)
    if isinstance(error, OSError):
        problem = f"cannot be written: {error.strerror or error}"
        return ConfigIssue("--local_dir", problem, "use another folder")
    return None


def _answered(error: Exception, repo_id: str) -> ConfigIssue:
    """Of an answer that has a status, and no further meaning."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        fix = f"{_LOG_IN} with a token that is valid"
        return ConfigIssue("--repo_id", "the hub does not accept the token", fix, repo_id)
    if status == 403:
        fix = "give it the right to read this repository (or gated ones), on the hub's page"
        return ConfigIssue("--repo_id", "the token's rights do not reach so far", fix, repo_id)
    return ConfigIssue("--repo_id", f"the hub answered with status {status}", "try later", repo_id)


def _is_of_the_network(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return type(error).__module__.partition(".")[0] in _NETWORKS
