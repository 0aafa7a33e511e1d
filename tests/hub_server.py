"""A local stand-in for the Hugging Face Hub: the part of its API that pushing and loading a model uses.

Commits are atomic, content is addressed by its digests, and tokens, namespaces and model cards are checked as
the Hub does. `fail` makes a request go wrong (a status, or a connection that drops before or after the work was done);
`damage` spoils a file in storage. Large files live under another host name (`localhost` against `127.0.0.1`), because
a client keeps `X-Repo-Commit` only of redirects that leave the host.

    with HubServer({"hf_token": "alice"}) as hub:
        push_folder("out", "alice/model", api=HfApi(endpoint=hub.url, token="hf_token"))
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

REPO = r"/(?:api/models/)?(?P<repo>[\w.-]+/[\w.-]+?)"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
REGULAR_BYTES = 10 * 2**20


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str = "", **body: object) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass(frozen=True)
class Answer:
    body: object = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """A file of a commit; `content` is None for a large file whose bytes only the chunk store has."""

    content: bytes | None
    size: int
    sha256: str
    large: bool

    @classmethod
    def of(cls, content: bytes, large: bool) -> Stored:
        return cls(content, len(content), hashlib.sha256(content).hexdigest(), large)

    @property
    def blob_id(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        tracked = pointer.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(tracked) + tracked).hexdigest()

    def entry(self, path: str) -> dict[str, object]:
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.blob_id}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, str, dict[str, Stored]]] = field(default_factory=list)  # id, message, files

    def add(self, message: str, files: dict[str, Stored]) -> str:
        oid = hashlib.sha1(f"{message} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, Stored]]:
        for oid, _, files in reversed(self.commits):
            if revision in ("main", oid):
                return oid, files
        raise Refused(404, "Invalid rev id", "RevisionNotFound")


@dataclass
class Fault:
    pattern: re.Pattern[str]
    times: int
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: str = ""  # "before" or "after" the work
    seconds: float = 0.0
    body: bytes = b'{"error": "made by the test"}'


class HubServer:
    """The server; `users` maps tokens to user names, `organisations` user names to their organisations."""

    def __init__(
        self,
        users: Mapping[str, str],
        *,
        organisations: Mapping[str, list[str]] | None = None,
        roles: Mapping[str, str] | None = None,
        chunk_store: Path | None = None,
    ) -> None:
        self.users, self.organisations, self.roles = users, organisations or {}, roles or {}
        self.chunk_store = chunk_store  # a folder: large files then arrive by Xet instead of LFS
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, float]] = []  # method, path, time
        self.faults: list[Fault] = []
        self.damaged: set[str] = set()
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, request: str, *, times: int = 1, **what: Any) -> None:
        """Let the next `times` requests whose `METHOD /path` matches go wrong; `what`: see `Fault`."""
        self.faults.append(Fault(re.compile(request), times, **what))

    def damage(self, path: str) -> None:
        """Spoil one byte of this file in every later commit."""
        self.damaged.add(path)

    def asked(self, request: str) -> list[float]:
        """Times of the requests whose `METHOD /path` matches."""
        return [when for method, path, when in self.requests if re.search(request, f"{method} {path}")]

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(request):
                    fault.times -= 1
                    return fault
        return None

    # -- who may do what

    def user_of(self, headers: Mapping[str, str]) -> str | None:
        scheme, _, token = (headers.get("Authorization") or "").partition(" ")
        if not scheme:
            return None
        if token not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def namespaces(self, user: str | None) -> list[str]:
        return [] if user is None else [user, *self.organisations.get(user, [])]

    def readable(self, repo_id: str, user: str | None) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.split("/")[0] not in self.namespaces(user)):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str, user: str | None) -> Repo:
        repo = self.readable(repo_id, user)
        if repo_id.split("/")[0] not in self.namespaces(user):
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    # -- the requests

    def whoami(self, request: Request) -> Answer:
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        token = next(token for token, name in self.users.items() if name == request.user)
        organisations = [{"name": name} for name in self.organisations.get(request.user, [])]
        role = {"accessToken": {"role": self.roles.get(token, "write")}}
        return Answer({"type": "user", "name": request.user, "orgs": organisations, "auth": role})

    def create(self, request: Request) -> Answer:
        asked = request.json()
        namespace = asked["organization"] or request.user
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        if namespace not in self.namespaces(request.user):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise Refused(409, "You already created this model repo", url=url)
        self.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.repos[repo_id].add("initial commit", {".gitattributes": Stored.of(attributes, False)})
        return Answer({"url": url, "name": repo_id})

    def validate(self, request: Request) -> Answer:
        header = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
        metadata = (yaml.safe_load(header.group(1)) if header else None) or {}
        errors = []
        for key in ("base_model", "datasets"):
            entries = metadata.get(key) or []
            for entry in [entries] if isinstance(entries, str) else entries:
                if not HUB_ID.fullmatch(entry):
                    errors.append({"message": f'"{key}" with value "{entry}" is not valid. Use an id of the Hub.'})
        if errors:
            raise Refused(400, "Invalid metadata", errors=errors, warnings=[])
        return Answer({"errors": [], "warnings": []})

    def info(self, request: Request, repo: str, revision: str = "main") -> Answer:
        found = self.readable(repo, request.user)
        oid, files = found.at(revision)
        siblings = [{"rfilename": path} for path in files]
        return Answer({"id": repo, "sha": oid, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, request: Request, repo: str, revision: str, folder: str | None = None) -> Answer:
        oid, files = self.readable(repo, request.user).at(revision)
        entries = [stored.entry(path) for path, stored in files.items() if path.startswith(f"{folder or ''}")]
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        return Answer(entries, headers={"X-Repo-Commit": oid})

    def preupload(self, request: Request, repo: str, revision: str) -> Answer:
        _, files = self.writable(repo, request.user).at(revision)
        modes = []
        for file in request.json()["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > REGULAR_BYTES
            large = large or b"\0" in base64.b64decode(file["sample"])
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if stored := files.get(file["path"]):
                mode["oid"] = stored.sha256 if stored.large else stored.blob_id
            modes.append(mode)
        return Answer({"files": modes})

    def large_batch(self, request: Request, repo: str) -> Answer:
        self.writable(repo, request.user)
        objects = []
        for wanted in request.json()["objects"]:
            put = {"upload": {"href": f"{self.storage_url}/large/{wanted['oid']}"}}
            actions = {} if wanted["oid"] in self.large else {"actions": put}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        return Answer({"transfer": "basic", "objects": objects})

    def put_large(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.content).hexdigest() != oid:
            raise Refused(400, "The content does not have this sha256")
        self.large[oid] = request.content
        return Answer()

    def get_large(self, request: Request, oid: str) -> Answer:
        return Answer(self.large[oid], headers={"ETag": f'"{oid}"'})

    def xet_token(self, request: Request, repo: str, revision: str) -> Answer:
        self.writable(repo, request.user)
        if self.chunk_store is None:
            raise Refused(404, "This server stores large files by LFS")
        url, until = f"local://{self.chunk_store}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
        return Answer({"casUrl": url, "accessToken": "xet", "exp": until}, headers=headers)

    def commit(self, request: Request, repo: str, revision: str) -> Answer:
        target = self.writable(repo, request.user)
        lines = [json.loads(line) for line in request.content.splitlines()]
        header = lines[0]["value"]
        oid, files = target.at(revision)
        if header.get("parentCommit") not in (None, target.head):
            raise Refused(412, "The expected parent commit is not the head of the branch")
        files = dict(files)
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        oid = target.add(header["summary"], files)
        url = f"{self.url}/{repo}/commit/{oid}"
        return Answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, Stored], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "deletedFile":
            if path not in files:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[path]
            return
        if key == "lfsFile":
            content = self.large.get(value["oid"])
            if content is None and self.chunk_store is None:
                raise Refused(400, f"Unknown large file {value['oid']}")
            files[path] = Stored(content, value["size"], value["oid"], True)
        else:
            files[path] = Stored.of(base64.b64decode(value["content"]), False)
        if path in self.damaged:
            spoilt = bytes([files[path].content[0] ^ 1]) + files[path].content[1:]
            files[path] = Stored.of(spoilt, files[path].large)

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        oid, files = self.readable(repo, request.user).at(revision)
        stored = files.get(path)
        if stored is None:
            refused = Refused(404, "Entry not found", "EntryNotFound")
            refused.headers["X-Repo-Commit"] = oid
            raise refused
        headers = {"X-Repo-Commit": oid, "ETag": f'"{stored.blob_id}"'}
        if not stored.large:
            return Answer(stored.content, headers=headers)
        linked = {"X-Linked-ETag": f'"{stored.sha256}"', "X-Linked-Size": str(stored.size)}
        location = {"Location": f"{self.storage_url}/large/{stored.sha256}"}
        return Answer(status=302, headers={**headers, **linked, **location})


@dataclass(frozen=True)
class Request:
    user: str | None
    content: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.content)


ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"GET /api/whoami-v2", HubServer.whoami),
    (r"POST /api/repos/create", HubServer.create),
    (r"POST /api/validate-yaml", HubServer.validate),
    (rf"POST {REPO}\.git/info/lfs/objects/batch", HubServer.large_batch),
    (r"PUT /large/(?P<oid>\w+)", HubServer.put_large),
    (r"GET /large/(?P<oid>\w+)", HubServer.get_large),
    (rf"GET {REPO}/revision/(?P<revision>[^/]+)", HubServer.info),
    (rf"GET {REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", HubServer.tree),
    (rf"POST {REPO}/preupload/(?P<revision>[^/]+)", HubServer.preupload),
    (rf"GET {REPO}/xet-write-token/(?P<revision>[^/]+)", HubServer.xet_token),
    (rf"POST {REPO}/commit/(?P<revision>[^/]+)", HubServer.commit),
    (rf"GET {REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubServer.resolve),
    (r"GET /api/models/(?P<repo>[\w.-]+/[\w.-]+)", HubServer.info),
]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def read_content(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def handle_any(self) -> None:
            path = urlsplit(self.path).path
            request = f"{self.command} {path}"
            with hub.lock:
                hub.requests.append((self.command, path, time.monotonic()))
            fault = hub.take_fault(request)
            content = self.read_content()
            if fault:
                time.sleep(fault.seconds)
            if fault and fault.drop == "before":
                return self.hang_up()
            if fault and fault.status:
                return self.send(Answer(fault.body, fault.status, fault.headers))
            try:
                answer = self.route(request, content)
            except Refused as refused:
                answer = Answer(refused.body, refused.status, refused.headers)
            if fault and fault.drop == "after":
                return self.hang_up()
            return self.send(answer)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 - names of the standard library

        def route(self, request: str, content: bytes) -> Answer:
            user = hub.user_of(self.headers)
            for pattern, answer in ROUTES:
                if found := re.fullmatch(pattern, request.replace("HEAD ", "GET ", 1)):
                    named = {name: unquote(value) for name, value in found.groupdict().items() if value}
                    with hub.lock:
                        return answer(hub, Request(user, content), **named)
            raise Refused(404, "Not found")

        def send(self, answer: Answer) -> None:
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    return Handler
