"""Buckets of S3 and of Google Cloud Storage, on servers that the tests start on loopback. The package needs the extras
`s3` and `gcs`; the servers are moto and gcp-storage-emulator, which `.ci/run` installs."""

import logging
import os
import socket
import threading

import pytest

fsspec = pytest.importorskip("fsspec")
logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request


class Faults:
    """A WSGI application between clients and a server: `statuses` answer the next requests of the methods `on`, before
    the server's own; `CUT` closes the connection in the middle of the request."""

    CUT = "cut"

    def __init__(self, app):
        self.app, self.statuses, self.on, self.requests = app, [], {"GET", "HEAD", "PUT", "POST", "DELETE"}, 0

    def __call__(self, environ, start_response):
        self.requests += 1
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
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # of gRPC, which the emulator has not; read on import
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()  # in a thread that would keep this process from its end
    yield f"http://127.0.0.1:{server._api._httpd.server_port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """URL of an empty bucket, its file system and the faults of its server."""
    endpoint, faults = s3_server
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-the-tests")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield from _bucket("s3", monkeypatch, tmp_path, faults)


@pytest.fixture
def gs(gcs_server, monkeypatch, tmp_path):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs_server)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "of-the-tests")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")  # of processes that the test starts
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    yield from _bucket("gs", monkeypatch, tmp_path, None)


def _bucket(scheme, monkeypatch, tmp_path, faults):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem(scheme, use_listings_cache=False)
    fs.mkdir("bucket")
    yield f"{scheme}://bucket", fs, faults
    if faults:
        faults.statuses.clear()
        faults.on = {"GET", "HEAD", "PUT", "POST", "DELETE"}
    fs.rm("bucket", recursive=True)


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    return request.getfixturevalue(request.param)
