"""A stand-in for the Hugging Face hub: as much of its API as downloads and commits of models need, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from cutting_servers import CuttingHandler

TOKEN = "hf_validtokenofthetest"


@dataclass
class Repository:
    """Commits by branch and by digest: the content of every file by name."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Make a commit and return its digest."""
        number = f"{len(self.commits)}{sorted(files)}"
        digest = hashlib.sha1(number.encode(), usedforsecurity=False).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        return digest

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Return the files at a branch or commit."""
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Hub:
    """The repositories and the large files that were uploaded."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    read_only: bool = False


class HubHandler(CuttingHandler):
    """Requests of huggingface_hub; files above `LARGE` bytes go through the LFS protocol."""

    hub: Hub
    LARGE = 10_000

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        """Answer with JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, text: str) -> None:
        """Answer with an error of the hub."""
        self.answer({"error": text}, status, X_Error_Code=code, X_Error_Message=text)

    def repository(self, name: str) -> Repository | None:
        """Return a repository that the caller may see; else the answer is sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.is_known()):
            self.refuse(404 if self.is_known() else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def is_known(self) -> bool:
        """Return whether the request has the valid token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self) -> None:  # noqa: N802
        """Answer requests for metadata and files."""
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.describe(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.list_files(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(match[1], match[2], match[3])
        else:
            self.refuse(404, "NotFound", path)

    do_HEAD = do_GET  # noqa: N815

    def describe(self, name: str, revision: str) -> None:
        """Send the commit of a revision."""
        repository = self.repository(name)
        if repository is not None:
            if repository.files(revision) is None:
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
            else:
                self.answer(
                    {
                        "id": name,
                        "sha": repository.branches.get(revision, revision),
                        "siblings": [],
                        "private": repository.private,
                    }
                )

    def list_files(self, name: str, revision: str) -> None:
        """Send names, sizes and digests of a revision's files."""
        repository = self.repository(name)
        if repository is not None:
            files = repository.files(revision)
            if files is None:
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
                return
            self.answer(
                [
                    {"type": "file", "oid": _git_digest(content), "size": len(content), "path": file}
                    | ({"lfs": _lfs(content)} if len(content) > self.LARGE else {})
                    for file, content in files.items()
                ]
            )

    def send_file(self, name: str, revision: str, file: str) -> None:
        """Send a file of a revision, or a range of it."""
        repository = self.repository(name)
        if repository is None:
            return
        content = (repository.files(revision) or {}).get(file)
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        digest = _lfs(content)["oid"] if len(content) > self.LARGE else _git_digest(content)
        commit = repository.branches.get(revision, revision)
        self.send_content(content, {"ETag": f'"{digest}"', "X-Repo-Commit": commit})

    def do_POST(self) -> None:  # noqa: N802
        """Answer requests that change something."""
        path = unquote(urlsplit(self.path).path)
        body = self.read_content()
        if body is None:
            return
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif not self.is_known():
            self.refuse(401, "Unauthorized", "Invalid username or password.")
        elif self.hub.read_only:
            self.refuse(403, "Forbidden", "You don't have the rights to create a model under this namespace")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            repository = self.hub.repositories[match[1]]
            repository.branches.setdefault(match[2], repository.branches["main"])
            self.answer({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            files = self.hub.repositories[match[1]].files(match[2]) or {}
            self.answer({"files": [self.upload_mode(files, file) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer(
                {"transfer": "basic", "objects": [self.upload_action(entry) for entry in json.loads(body)["objects"]]}
            )
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self.commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self.refuse(404, "NotFound", path)

    def create(self, wanted: dict[str, Any]) -> None:
        """Create a repository with one commit."""
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self.answer({"error": "You already created this model repo", "url": f"/{name}"}, 409)
            return
        repository = self.hub.repositories[name] = Repository(
            wanted.get("private") is True or wanted.get("visibility") == "private"
        )
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})

    def upload_mode(self, files: dict[str, bytes], file: dict[str, Any]) -> dict[str, Any]:
        """Return how a file is to be uploaded."""
        present = files.get(file["path"])
        mode = "lfs" if file["size"] > self.LARGE else "regular"
        digest = None if present is None else _git_digest(present) if mode == "regular" else _lfs(present)["oid"]
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": digest}

    def upload_action(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return where a large file goes; nowhere if it is there."""
        action = {"upload": {"href": f"http://{self.headers['Host']}/objects/{entry['oid']}"}}
        return entry | ({} if entry["oid"] in self.hub.objects else {"actions": action})

    def do_PUT(self) -> None:  # noqa: N802
        """Store a large file."""
        content = self.read_content()
        if content is not None:
            oid = self.path.rpartition("/")[2]
            if _lfs(content)["oid"] == oid:
                self.hub.objects[oid] = content
            self.answer({})

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        """Make a commit of the files in the lines of a request."""
        repository = self.hub.repositories[name]
        files = dict(repository.files(branch) or {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        digest = repository.commit(branch, files)
        self.answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{digest}", "commitOid": digest})


def _git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _lfs(content: bytes) -> dict[str, Any]:
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
