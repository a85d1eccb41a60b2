"""The hub's side of an upload: repositories that are made, large files that arrive, commits."""

import base64
import json
import re
from hashlib import sha1, sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.unit.hub_server import Answer, Hub

_REPO = r"([\w.-]+/[\w.-]+)"
_OF_MODEL = re.compile(rf"/api/models/{_REPO}/(preupload|commit|xet-write-token)/([^/]+)")
_BATCH = re.compile(rf"/{_REPO}\.git/info/lfs/objects/batch")
_LARGE = ".safetensors"


def answer(hub: "Hub", method: str, path: str, token: str | None, body: bytes) -> "Answer | None":
    """The answer to a request of an upload; None to any other."""
    blob = path.partition("/blobs/")[2]
    of_model, batch = _OF_MODEL.fullmatch(path), _BATCH.fullmatch(path)
    if path == "/api/validate-yaml":
        return _json({"errors": [], "warnings": []})
    if blob and method == "PUT":  # a URL that is signed, as of a store elsewhere
        hub.blobs[sha256(body).hexdigest()] = body
        return _json({})
    if blob:  # verify
        return _json({}, 200 if json.loads(body)["oid"] in hub.blobs else 404)
    if path != "/api/repos/create" and not of_model and not batch:
        return None
    if token is None:
        return 401, {"X-Error-Message": "Invalid username or password."}, b"{}"
    if token not in hub.writers:
        return 403, {"X-Error-Message": "You don't have the rights to write here"}, b"{}"
    if batch:
        return _json({"objects": [_place(hub, entry) for entry in json.loads(body)["objects"]]})
    return _of_model(hub, of_model, body) if of_model else _create(hub, json.loads(body))


def _json(value: Any, status: int = 200) -> "Answer":
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _create(hub: "Hub", asked: dict[str, Any]) -> "Answer":
    from tests.unit.hub_server import Repository

    name = f"{asked['organization']}/{asked['name']}"
    if name in hub.repositories:
        return _json({"url": f"{hub.url}/{name}", "error": "You already created this"}, 409)
    hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
    return _json({"url": f"{hub.url}/{name}"})


def _place(hub: "Hub", entry: dict[str, Any]) -> dict[str, Any]:
    """Address for a large file; none if the hub has it."""
    if entry["oid"] in hub.blobs:
        return entry
    href = f"{hub.url}/blobs/{entry['oid']}"
    return entry | {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}


def _of_model(hub: "Hub", match: re.Match[str], body: bytes) -> "Answer":
    name, what, revision = match.groups()
    repository = hub.repositories.get(name)
    if repository is None:
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    if revision not in repository.revisions:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    if what == "xet-write-token":
        return _json({}, 404)
    if what == "preupload":
        asked = json.loads(body)["files"]
        return _json({"files": [_mode(repository.files, entry["path"]) for entry in asked]})
    files = dict(repository.files)
    for line in map(json.loads, body.splitlines()):
        key, value = line["key"], line["value"]
        if key == "header":
            message = value["summary"]
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
    repository.files = files
    hub.commits.append(message)
    commit = sha1(body).hexdigest()
    return _json({"commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}"})


def _mode(files: dict[str, bytes], path: str) -> dict[str, Any]:
    """The way to send a file, and the content that the hub has of this name."""
    is_large, content = path.endswith(_LARGE), files.get(path)
    entry = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
    if content is None:
        return entry
    blob = b"blob %d\0" % len(content) + content
    return entry | {"oid": sha256(content).hexdigest() if is_large else sha1(blob).hexdigest()}
