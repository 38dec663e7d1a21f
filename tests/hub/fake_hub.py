"""A Hugging Face Hub on loopback: what `huggingface_hub` asks of the real one to read, and to commit."""

import base64
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.inference.serving import serving


@dataclasses.dataclass
class Repo:
    commits: dict[str, dict[str, bytes]]
    """The files of each commit."""
    branches: dict[str, str]
    gated: bool = False
    private: bool = False


class FakeHub:
    """Repositories by `models/ORG/NAME` or `datasets/ORG/NAME`. `requests` are the method and path of each request."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.lfs: dict[str, bytes] = {}
        self.cut: set[str] = set()
        """Files whose next download ends in the middle."""
        self.query = ""
        """Of the URLs of uploads."""
        self.fail: dict[str, int] = {}
        """Status of all requests whose path contains the key."""
        repo, id_ = "/api/{kind}/{org}/{name}", "{org}/{name}"
        self.app = Starlette(
            routes=[
                Route(repo, self._info),
                Route(f"{repo}/revision/{{revision}}", self._info),
                Route(f"{repo}/tree/{{revision}}", self._tree),
                Route(f"/{id_}/resolve/{{revision}}/{{path:path}}", self._file, methods=["GET", "HEAD"]),
                Route(f"/datasets/{id_}/resolve/{{revision}}/{{path:path}}", self._file, methods=["GET", "HEAD"]),
                Route("/api/repos/create", self._create, methods=["POST"]),
                Route(f"{repo}/preupload/{{revision}}", self._preupload, methods=["POST"]),
                Route(f"{repo}/commit/{{revision}}", self._commit, methods=["POST"]),
                Route(f"{repo}/branch/{{revision}}", self._branch, methods=["POST"]),
                Route("/{org}/{name}.git/info/lfs/objects/batch", self._batch, methods=["POST"]),
                Route("/lfs/{oid}", self._upload, methods=["PUT"]),
            ]
        )

    def add(self, name: str, files: dict[str, bytes], *, branch: str = "main", **options) -> str:
        """Commit files, which are all that the commit has. Returns its hash."""
        repo = self.repos.setdefault(name, Repo({}, {}, **options))
        content = repr((name, len(repo.commits), sorted(files.items()))).encode()
        commit = hashlib.sha1(content).hexdigest()
        repo.commits[commit], repo.branches[branch] = dict(files), commit
        return commit

    def downloads(self) -> list[str]:
        """Names of the files that were downloaded so far, sorted."""
        return sorted(
            path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path
        )

    def _open(self, request: Request) -> tuple[Repo, str] | Response:
        """The repository and the commit of a request, or the answer if there are none."""
        self.requests.append((request.method, request.url.path))
        for part, status in self.fail.items():
            if part in request.url.path:
                return JSONResponse({"error": "out of order"}, status)
        at = request.path_params
        kind = at.get("kind", "datasets" if request.url.path.startswith("/datasets/") else "models")
        repo = self.repos.get(f"{kind}/{at['org']}/{at['name']}")
        if repo is None or (repo.private and "authorization" not in request.headers):
            return _error(404 if repo is None else 401, "RepoNotFound")
        if repo.gated and "resolve" in request.url.path:
            return _error(403, "GatedRepo")
        revision = at.get("revision", "main")
        commit = repo.branches.get(revision, revision)
        return (repo, commit) if commit in repo.commits else _error(404, "RevisionNotFound")

    async def _info(self, request: Request) -> Response:
        if isinstance(opened := self._open(request), Response):
            return opened
        repo, commit = opened
        id_ = f"{request.path_params['org']}/{request.path_params['name']}"
        siblings = [{"rfilename": name} for name in repo.commits[commit]]
        return JSONResponse({"id": id_, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []})

    async def _tree(self, request: Request) -> Response:
        if isinstance(opened := self._open(request), Response):
            return opened
        files = opened[0].commits[opened[1]]
        entries = ({"type": "file", "oid": _oid(c), "size": len(c), "path": path} for path, c in files.items())
        return JSONResponse(list(entries))

    async def _file(self, request: Request) -> Response:
        if isinstance(opened := self._open(request), Response):
            return opened
        (repo, commit), path = opened, request.path_params["path"]
        if (content := repo.commits[commit].get(path)) is None:
            return _error(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        first, last = 0, len(content) - 1
        if wanted := request.headers.get("range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end), last) if end else last
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        body = content[first : last + 1]
        headers["Content-Length"] = str(len(body))
        if request.method == "GET" and path in self.cut:
            self.cut.remove(path)
            body = body[: len(body) // 2]  # less than announced: the server closes the connection
        return Response(b"" if request.method == "HEAD" else body, 206 if wanted else 200, headers)

    async def _create(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path))
        if "authorization" not in request.headers:
            return JSONResponse({"error": "Invalid username or password."}, 401)
        body = await request.json()
        name = f"{body.get('type', 'model')}s/{body['organization']}/{body['name']}"
        status = 409 if name in self.repos else 200
        if status == 200:
            self.add(
                name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=body.get("visibility") == "private"
            )
        return JSONResponse({"url": f"{request.base_url}{body['organization']}/{body['name']}"}, status)

    async def _branch(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path))
        at = request.path_params
        branches = self.repos[f"{at['kind']}/{at['org']}/{at['name']}"].branches
        existed = at["revision"] in branches
        branches.setdefault(at["revision"], branches["main"])
        return Response(status_code=409 if existed else 200)

    async def _preupload(self, request: Request) -> Response:
        if isinstance(opened := self._open(request), Response):
            return opened
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in (await request.json())["files"]
        ]
        return JSONResponse({"files": files})

    async def _batch(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path))
        upload = {"href": f"{request.base_url}lfs/"}
        objects = (await request.json())["objects"]
        answers = [
            o | {"actions": {"upload": {"href": upload["href"] + o["oid"] + self.query, "header": {}}}} for o in objects
        ]
        return JSONResponse({"transfer": "basic", "objects": answers})

    async def _upload(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path))
        body = await request.body()
        if any(part in request.url.path for part in self.fail):
            return JSONResponse({"error": "out of order"}, 403)
        assert hashlib.sha256(body).hexdigest() == request.path_params["oid"]
        self.lfs[request.path_params["oid"]] = body
        return Response(status_code=200)

    async def _commit(self, request: Request) -> Response:
        if isinstance(opened := self._open(request), Response):
            return opened
        repo, parent = opened
        files = dict(repo.commits[parent])
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", parent) != parent:
                return JSONResponse({"error": "the branch has moved"}, 412)
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        at = request.path_params
        commit = self.add(f"{at['kind']}/{at['org']}/{at['name']}", files, branch=at["revision"])
        return JSONResponse(
            {"commitUrl": f"{request.base_url}{at['org']}/{at['name']}/commit/{commit}", "commitOid": commit}
        )


@contextlib.contextmanager
def listening(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, directory: Path) -> Iterator[None]:
    """While the Hub listens, `huggingface_hub` calls it, with a cache in `directory` and without a token."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(directory / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "")
    with serving(fake.app) as port:
        endpoint = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _error(status: int, code: str) -> Response:
    return JSONResponse({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})
