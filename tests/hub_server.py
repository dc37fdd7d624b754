"""A hub on this machine alone, as far as its client needs one to put a folder there and to fetch it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories: name -> commits, each a name and the content of every file."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(repository, [])
        whole = {**(commits[-1][1] if commits else {}), **files}
        digest = hashlib.sha1(json.dumps(sorted((n, hashlib.sha1(c).hexdigest()) for n, c in whole.items())).encode())
        commits.append((digest.hexdigest(), whole))
        return commits[-1][0]

    def find(self, repository: str, revision: str):
        commits = self.repositories.get(repository, [])
        return next((each for each in reversed(commits) if revision in ("main", each[0])), None)


@contextmanager
def serve_hub():
    """Yield a hub and its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_arguments):
            pass

        def answer(self, content, status=200, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                found = hub.find("/".join(parts[2:4]), parts[5] if parts[4:5] in (["revision"], ["tree"]) else "main")
                if found is None:
                    return self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
                name = "/".join(parts[2:4])
                if parts[4:5] == ["tree"]:
                    rows = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in found[1].items()]
                    return self.answer(rows)
                rows = [{"rfilename": file} for file in sorted(found[1])]
                return self.answer({"id": name, "modelId": name, "sha": found[0], "siblings": rows, "private": False})
            if len(parts) >= 5 and parts[2] == "resolve":
                found = hub.find("/".join(parts[:2]), parts[3])
                content = None if found is None else found[1].get("/".join(parts[4:]))
                if content is None:
                    code = "EntryNotFound" if found else "RepoNotFound"
                    return self.answer({"error": "not found"}, 404, X_Error_Code=code)
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                return self.answer(content, ETag=tag, X_Repo_Commit=found[0])
            return self.answer({"error": "not found"}, 404)

        def do_POST(self):
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = path.split("/")
            if path == "api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != "Bearer secret":
                return self.answer({"error": "unauthorised"}, 401)
            if path == "api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.repositories.setdefault(name, [])
                return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
            if parts[-2:-1] == ["preupload"]:
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if parts[-2:-1] == ["commit"]:
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                name = "/".join(parts[2:4])
                oid = hub.add(name, files)
                return self.answer(
                    {
                        "success": True,
                        "commitOid": oid,
                        "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{oid}",
                    }
                )
            return self.answer({"error": "not found"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
