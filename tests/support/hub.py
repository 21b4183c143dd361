# SPDX-License-Identifier: Apache-2.0
"""A model hub on loopback, as far as ``huggingface_hub`` asks one to fetch a model, and a hub cache on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(revision: str) -> str:
    """The commit that stands for a revision here."""
    return hashlib.sha1(revision.encode()).hexdigest()


def into_cache(cache: Path, repository: str, revision: str, folder: Path) -> Path:
    """Put a folder into a hub cache as a revision of a repository; the folder of its snapshot."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit_of(revision))
    snapshot = root / "snapshots" / commit_of(revision)
    shutil.copytree(folder, snapshot)
    return snapshot


@contextmanager
def hub(repository: str, revisions: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve one repository; its address, and the files that were fetched so far."""
    fetched: list[str] = []
    known = {**revisions, **{commit_of(name): folder for name, folder in revisions.items()}}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None: ...

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.about(parts[2:])
            elif "resolve" in parts:
                self.file(parts)
            else:
                self.reply(404, b"{}")

        do_HEAD = do_GET  # noqa: N815

        def about(self, parts: list[str]) -> None:
            revision = parts[3] if len(parts) > 3 else "main"
            if "/".join(parts[:2]) != repository or revision not in known:
                self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
                return
            folder = known[revision]
            files = sorted(path for path in folder.iterdir() if path.is_file())
            if parts[2:3] == ["tree"]:
                found: object = [
                    {
                        "type": "file",
                        "path": path.name,
                        "size": path.stat().st_size,
                        "oid": commit_of(path.name),
                    }
                    for path in files
                ]
            else:
                sha = revision if revision not in revisions else commit_of(revision)
                siblings = [{"rfilename": path.name} for path in files]
                found = {"id": repository, "sha": sha, "siblings": siblings, "private": False}
            self.reply(200, json.dumps(found).encode(), Content_Type="application/json")

        def file(self, parts: list[str]) -> None:
            at = parts.index("resolve")
            revision, name = parts[at + 1], "/".join(parts[at + 2 :])
            path = known.get(revision, Path("/nowhere")) / name
            if "/".join(parts[:at]) != repository or not path.is_file():
                self.reply(404, b"", X_Error_Code="EntryNotFound")
                return
            body = path.read_bytes()
            if self.command == "GET":
                fetched.append(name)
            commit = revision if revision not in revisions else commit_of(revision)
            etag = hashlib.sha256(body).hexdigest()
            self.reply(200, body, ETag=f'"{etag}"', X_Repo_Commit=commit)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
