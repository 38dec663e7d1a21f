"""Files by URL: buckets (`s3://…`, `gs://…`), through fsspec, and the Hugging Face Hub.

Credentials, endpoints and retries are by the rules of s3fs and gcsfs (`AWS_ENDPOINT_URL`, `AWS_PROFILE`,
`GOOGLE_APPLICATION_CREDENTIALS`, `STORAGE_EMULATOR_HOST`). What is read from a bucket is copied once into
`mla_moe/buckets` of the user's cache directory; an object that has changed there gets a new copy.
"""

import contextlib
import errno
import hashlib
import importlib
import os
import re
import uuid
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mla_moe.config.errors import ConfigError, require, require_local, without_secrets
from mla_moe.config.hub import download_file, download_files, hub_errors, is_hub, parse_url, shown

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_BUCKETS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
"""Scheme -> the module that reads it, and the extra of this package with it."""
_CONNECTIONS = 8
_PART_BYTES = 16 << 20
"""Bytes of one part of an upload to a bucket; the client holds ten parts in memory."""


def is_bucket(path: Any) -> bool:
    """Whether a path is a URL of a bucket, also as a `Path`, which drops one of the slashes."""
    return re.match("(s3|gs):/", str(path)) is not None


def is_url(path: Any) -> bool:
    """Whether a path is a URL of a bucket or of the Hub."""
    return is_hub(path) or is_bucket(path)


def require_path(field: str, path: Any) -> None:
    """Raise `ConfigError` for what names no file of this host, of a bucket or of the Hub."""
    if is_hub(path):
        parse_url(path, field)
    elif is_bucket(path):
        _module(field, path)
    else:
        require_local(field, path, "files of this host and hf://, s3:// and gs:// URLs are read here")


def require_run_dir(path: str) -> None:
    """Raise `ConfigError` for what names no directory of this host or of a bucket."""
    if is_bucket(path):
        _module("run_dir", path)
    else:
        require_local("run_dir", path, "directories of this host and s3:// and gs:// URLs are written here")


def _module(field: str, url: Any) -> Any:
    module, extra = _BUCKETS[str(url)[:2]]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(field, shown(url), f"needs {module}: pip install 'mla_moe[{extra}]'") from None


def open_url(url: Any, field: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of a URL, and the path in it. Raises `ConfigError` on `field` for a URL without a bucket, and if
    its extra is not installed."""
    from fsspec.core import url_to_fs
    from huggingface_hub import HfFileSystem

    if is_hub(url):
        return HfFileSystem(skip_instance_cache=True), shown(url).removeprefix("hf://")
    _module(field, url)
    fs, path = url_to_fs(shown(url), use_listings_cache=False)
    if not path.strip("/"):
        raise ConfigError(field, shown(url), "names no bucket; write s3://BUCKET/PATH or gs://BUCKET/PATH")
    return fs, path.rstrip("/")


def local_file(url: Any, field: str, default: str, beside: Sequence[str] = ()) -> Path:
    """The local copy of a file that a URL names, or of the file `default` in it, with those of the files `beside` it
    that exist."""
    if is_hub(url):
        return download_file(url, field, default, beside)
    folder, name = shown(url), default
    if PurePosixPath(folder).suffix == PurePosixPath(default).suffix:
        folder, _, name = folder.rpartition("/")
    objects = list_objects(folder, field)
    require(name in objects, field, shown(url), f"has no file {name}; name another")
    return copy_objects(folder, field, {n: objects[n] for n in (name, *beside) if n in objects}) / name


def local_files(pattern: str, field: str) -> list[str]:
    """Paths of local copies of all files that match a glob of URLs, sorted, without hidden ones. Raises `ConfigError`
    on `field` if there are none."""
    if is_hub(pattern):
        return download_files(pattern, field)
    fs, path = open_url(pattern, field)
    with storage_errors(field, pattern):
        found = {name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"}
    names = sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))
    fix = f"matches no object; check the URL, quote the glob, or write {pattern.rstrip('/')}/**/*"
    require(len(names) > 0, field, pattern, fix)

    def copy(name: str) -> str:
        last = name.rpartition("/")[2]
        return str(copy_objects(pattern, field, {last: found[name]}) / last)

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(copy, names))


def list_objects(url: Any, field: str) -> dict[str, dict[str, Any]]:
    """A bucket's entry for each object directly below a URL, by name."""
    fs, root = open_url(url, field)
    with storage_errors(field, url):
        return {e["name"].rpartition("/")[2]: e for e in fs.ls(root, detail=True) if e["type"] == "file"}


def copy_objects(url: Any, field: str, objects: Mapping[str, Mapping[str, Any]], folder: Path | None = None) -> Path:
    """Copy objects into the cache, by the names of their copies. Returns their folder, `cache_folder(objects)` if none
    is given; what is there already is not copied again."""
    fs, _ = open_url(url, field)
    folder = cache_folder(objects) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)

    def copy(name: str) -> None:
        file = folder / name
        if not file.exists() or file.stat().st_size != objects[name]["size"]:  # a crash of the host may cut it
            unfinished = folder / f".{name}.{uuid.uuid4().hex}"
            try:
                copy_object(fs, objects[name], unfinished, field, url)
                os.replace(unfinished, file)
            finally:
                unfinished.unlink(missing_ok=True)

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(copy, objects))
    return folder


def copy_object(fs: "AbstractFileSystem", info: Mapping[str, Any], path: Path, field: str, url: Any) -> None:
    """Download an object to a local file. Raises `ConfigError` if the bucket rejects the request, for a part of the
    object, and for an object that changed meanwhile, of which the file may have parts of two versions."""
    with storage_errors(field, url):
        fs.get_file(info["name"], str(path))
        after = fs.info(info["name"])
    size, name = path.stat().st_size, f"{shown(url)} ({info['name']})"
    fix = f"has {size} bytes instead of {info['size']} after its download; start again"
    require(size == info["size"], field, name, fix)
    require(object_version(after) == object_version(info), field, name, "changed while it was downloaded; start again")


def cache_folder(objects: Mapping[str, Mapping[str, Any]]) -> Path:
    """Where copies of objects are: another folder for other objects, and for other versions of them."""
    versions = [(e["name"], *object_version(e)) for e in objects.values()]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "mla_moe" / "buckets" / hashlib.sha256(repr(sorted(versions)).encode()).hexdigest()[:32]


def upload_object(fs: "AbstractFileSystem", file: Path, target: str, field: str, url: Any) -> None:
    """Upload a file as the object `target`. Raises `ConfigError` if the bucket rejects the request, and for an
    object of another size."""
    size = file.stat().st_size
    with storage_errors(field, url):
        fs.put_file(str(file), target, chunksize=_PART_BYTES)
        found = fs.info(target)["size"]
    require(found == size, field, shown(url), f"{file.name} has {found} bytes there instead of {size}; start again")


def kvstore(url: str) -> dict[str, Any]:
    """TensorStore's name of a folder of a bucket. Credentials are by the rules of its drivers; a server instead of
    Amazon's or Google's is the one of s3fs and gcsfs."""
    scheme, _, path = shown(url).partition("://")
    bucket, _, folder = path.partition("/")
    spec: dict[str, Any] = {"driver": "s3" if scheme == "s3" else "gcs", "bucket": bucket, "path": f"{folder}/"}
    environment = os.environ
    if scheme == "gs":
        if server := environment.get("STORAGE_EMULATOR_HOST"):
            environment.setdefault("TENSORSTORE_GCS_HTTP_URL", server)
        return spec
    if "AWS_ACCESS_KEY_ID" in environment:  # the default logs an error for each file of credentials that is not there
        spec["aws_credentials"] = {"type": "environment"}
    if server := environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"):
        region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": server, "aws_region": region}
    return spec


def object_version(info: Mapping[str, Any]) -> tuple[Any, ...]:
    """The version of an object, which differs for another content, as far as its bucket reports."""
    return info["size"], info.get("ETag") or info.get("etag") or info.get("mtime")


_OUTAGES = {
    errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}  # fmt: skip
"""Error numbers of the system, and those with which s3fs reports that the server has failed or is busy."""
_OUTAGE_CLASSES = {"ClientConnectionError", "ClientPayloadError", "HTTPClientError", "ConnectionError"}
"""Names of error classes of aiohttp and botocore, which need not be installed."""


def _is_outage(error: Exception) -> bool:
    """Whether the server was not reached or has failed, which a later try may mend."""
    code = getattr(error, "code", None)  # of gcsfs
    return (
        isinstance(error, ConnectionError | TimeoutError)
        or (isinstance(error, OSError) and error.errno in _OUTAGES)
        or (isinstance(code, int) and (code == 429 or code >= 500))
        or not _OUTAGE_CLASSES.isdisjoint(c.__name__ for c in type(error).__mro__)
    )


@contextlib.contextmanager
def storage_errors(field: str, url: Any) -> Generator[None]:
    """Errors of the Hub or of a bucket's client, in one line: of a bucket `ConnectionError` for an outage, else
    `ConfigError`. Those of the local disk stay as they are."""
    if is_hub(url):
        with hub_errors(field, url):
            yield
        return
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # each client has classes of its own
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE):
            raise
        fix = "check the URL, the connection and your credentials"
        if isinstance(error, FileNotFoundError):
            fix = "no such object or bucket; check the URL"
        reason = "" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}; "
        wrong = ConfigError(field, shown(url), f"{without_secrets(reason)}{fix}")
        if _is_outage(error):
            raise ConnectionError(str(wrong)) from None
        raise wrong from None
