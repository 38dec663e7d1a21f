"""Buckets of S3 and of Google Cloud Storage, on servers that the tests start on loopback. The package needs the extras
`s3` and `gcs`; the servers are moto and gcp-storage-emulator, which `.ci/run` installs."""

import contextlib
import functools
import logging
import os
import socket
import threading
from urllib.parse import unquote

import pytest

from mla_moe.checkpoint.bucket_run import COMMIT, Mirror
from mla_moe.checkpoint.files import CheckpointSaveError
from mla_moe.config import (
    CheckpointConfig,
    MeshConfig,
    SampleConfig,
)
from tests.forked_runs import small_recipe

fsspec = pytest.importorskip("fsspec")
# Of gRPC, which the emulator has not. Read when gcsfs is imported, which some fixtures do before that of its server.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request


class Watched:
    """`watch` is called with method and path of each request, before the server answers it."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.watch = lambda method, path: None


class Faults(Watched):
    """A WSGI application between clients and a server: `statuses` answer the next requests of the methods `on`, before
    the server's own; `CUT` closes the connection in the middle of the request."""

    CUT = "cut"

    def __init__(self, app):
        self.app = app
        super().__init__()

    def clear(self):
        super().clear()
        self.statuses, self.on = [], {"GET", "HEAD", "PUT", "POST", "DELETE"}

    def __call__(self, environ, start_response):
        self.watch(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if self.statuses and environ["REQUEST_METHOD"] in self.on:
            if self.statuses[0] == self.CUT:
                self.statuses.pop(0)
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                return [b""]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status = self.statuses.pop(0)
            start_response(f"{status} Failed", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return [b""]
        return self.app(environ, start_response)


@pytest.fixture(scope="session")
def s3_server():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    from werkzeug.serving import make_server

    faults = Faults(server.DomainDispatcherApplication(server.create_backend_app))
    running = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", faults
    running.shutdown()
    thread.join()


@pytest.fixture(scope="session")
def gcs_server():
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()  # in a thread that would keep this process from its end
    watched, running = Watched(), server._api._httpd

    class Handler(emulator.RequestHandler):
        def parse_request(self):
            parsed = super().parse_request()
            if parsed:
                watched.watch(self.command, unquote(self.path))
            return parsed

    running.RequestHandlerClass = functools.partial(Handler, server._storage)
    running.socket.listen(128)  # more than 5 that wait, as by default, would be dropped and tried again after seconds
    yield f"http://127.0.0.1:{running.server_port}", watched
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """URL of an empty bucket, its file system, and what is between it and its server."""
    endpoint, faults = s3_server
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-the-tests")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield from _bucket("s3", monkeypatch, tmp_path, faults)


@pytest.fixture
def gs(gcs_server, monkeypatch, tmp_path):
    endpoint, watched = gcs_server
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", endpoint)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "of-the-tests")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")  # of processes that the test starts
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    yield from _bucket("gs", monkeypatch, tmp_path, watched)


def _bucket(scheme, monkeypatch, tmp_path, server):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem(scheme, use_listings_cache=False)
    fs.mkdir("bucket")
    yield f"{scheme}://bucket", fs, server
    server.clear()
    fs.rm("bucket", recursive=True)


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def recipe(cfg, tmp_path_factory):
    fields = {"mesh": MeshConfig(), "checkpoint": CheckpointConfig(every=2, max_to_keep=3), "sample": SampleConfig()}
    return small_recipe(cfg, tmp_path_factory.mktemp("text"), 6, **fields)


@pytest.fixture
def failing_commit():
    @contextlib.contextmanager
    def failing(step):
        """The save of this step fails when everything but its last object is written."""
        upload_file = Mirror.upload_file

        def failing_upload(mirror, path):
            if path.name == COMMIT and path.parent.name == str(step):
                raise ConnectionError("the network is down")
            upload_file(mirror, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Mirror, "upload_file", failing_upload)
            problem = "/run/checkpoints/pretrain: a checkpoint could not be saved .the network is down.; check the"
            with pytest.raises(CheckpointSaveError, match=problem):
                yield

    return failing
