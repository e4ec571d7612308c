"""A server on loopback that speaks as much of the Hub's protocol as uploads and downloads of a model need."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

MODEL = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree|preupload|commit)/(?P<revision>[^/]+))?.*")
FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Hub:
    """Repositories: id -> branch or commit -> file -> bytes. `requests` lists what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.url = ""
        # Of a hostile server: what it answers instead of the commit and the ETag, and whether it answers at all.
        self.sha: str | None = None
        self.etag: str | None = None
        self.silent = Event()

    def push(self, id: str, files: dict[str, bytes]) -> str:
        """A commit on main with these files added; its hash."""
        revisions = self.repositories.setdefault(id, {})
        content = revisions.get("main", {}) | files
        commit = hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()
        revisions[commit] = revisions["main"] = content
        return commit

    def commit_of(self, id: str, revision: str) -> str | None:
        revisions = self.repositories.get(id, {})
        return next(
            (name for name in revisions if len(name) == 40 and revisions[name] is revisions.get(revision)), None
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of loopback."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(payload))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(payload)

        def refuse(self, code: str) -> None:
            self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if hub.silent.is_set():
                return time.sleep(5)
            match = FILE.fullmatch(path) or MODEL.fullmatch(path)
            if match is None or match["id"] not in hub.repositories:
                return self.refuse("RepoNotFound")
            id, revision = match["id"], match["revision"] or "main"
            commit = hub.commit_of(id, revision)
            if commit is None:
                return self.refuse("RevisionNotFound")
            files = hub.repositories[id][commit]
            if "file" not in match.groupdict():
                tree = [
                    {"type": "file", "path": name, "size": len(found), "oid": hashlib.sha1(found).hexdigest()}
                    for name, found in files.items()
                ]
                about = {
                    "id": id,
                    "sha": hub.sha or commit,
                    "private": False,
                    "siblings": [{"rfilename": one} for one in files],
                }
                return self.answer(tree if match["what"] == "tree" else about)
            if match["file"] not in files:
                return self.refuse("EntryNotFound")
            found = files[match["file"]]
            etag = f'"{hub.etag or hashlib.sha1(found).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": hub.sha or commit, "Accept-Ranges": "bytes"}
            self.answer(found, headers=headers)
            return None

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            hub.requests.append(f"POST {self.path}")
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                id = f"{asked['organization']}/{asked['name']}"
                hub.push(id, {".gitattributes": b""})
                return self.answer({"url": f"{hub.url}/{id}"})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            match = MODEL.fullmatch(urlsplit(self.path).path)
            assert match is not None, self.path
            if match["what"] == "preupload":
                asked = json.loads(body)["files"]
                files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
                return self.answer({"files": files})
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = hub.push(match["id"], files)
            self.answer({"commitOid": commit, "commitUrl": f"{hub.url}/{match['id']}/commit/{commit}"})
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
