"""An imitation of the hub: the requests that huggingface_hub makes for a public model, served from a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Asked:
    """One request for a file."""

    method: str
    name: str
    start: int = 0
    stop: int | None = None


@dataclass
class Hub:
    """A running imitation. `phases` holds the file requests between two calls of `/mark/<phase>`."""

    repo_id: str
    root: Path
    url: str = ""
    phases: dict[str, list[Asked]] = field(default_factory=lambda: {"": []})

    def downloads(self, phase: str) -> set[str]:
        """The files that were fetched whole."""
        return {asked.name for asked in self.phases[phase] if asked.method == "GET" and asked.stop is None}

    def ranges(self, phase: str) -> list[Asked]:
        return [asked for asked in self.phases[phase] if asked.method == "GET" and asked.stop is not None]


@contextmanager
def serve(repo_id: str, root: Path) -> Iterator[Hub]:
    hub = Hub(repo_id, root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.refuse("EntryNotFound")

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            files = sorted(each for each in hub.root.rglob("*") if each.is_file())
            names = {each.relative_to(hub.root).as_posix(): each.stat().st_size for each in files}
            if path.startswith("/mark/"):
                hub.phases[path.removeprefix("/mark/")] = []
                return self.answer(b"{}")
            api = f"/api/models/{repo_id}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name, "size": size, "blobId": oid(name)} for name, size in names.items()]
                return self.answer(json.dumps({"id": repo_id, "sha": COMMIT, "siblings": siblings}).encode())
            if path == f"{api}/tree/{COMMIT}":
                tree = [{"type": "file", "path": name, "size": size, "oid": oid(name)} for name, size in names.items()]
                return self.answer(json.dumps(tree).encode())
            if path.startswith(f"{api}/revision/"):
                return self.refuse("RevisionNotFound")
            resolve = f"/{repo_id}/resolve/"
            if path.startswith(resolve):
                _, _, name = path.removeprefix(resolve).partition("/")
                if name not in names:
                    return self.refuse("EntryNotFound")
                return self.serve_file(name, names[name])
            self.refuse("RepoNotFound")

        def serve_file(self, name: str, size: int) -> None:
            wanted = self.headers.get("Range")
            phase = hub.phases[next(reversed(hub.phases))]
            headers = {"ETag": f'"{oid(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if wanted is None:
                phase.append(Asked(self.command, name))
                return self.answer((hub.root / name).read_bytes(), headers=headers)
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, size) if last else size
            phase.append(Asked(self.command, name, start, stop))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self.answer((hub.root / name).read_bytes()[start:stop], status=206, headers=headers)

        def refuse(self, code: str) -> None:
            self.answer(
                b'{"error": "no"}', status=404, headers={"X-Error-Code": code, "X-Error-Message": f"{code}: no"}
            )

        def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def oid(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()
