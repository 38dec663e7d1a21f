"""The Hugging Face Hub: files by `hf://` URLs, downloaded into the cache of `huggingface_hub`, and commits to it.

Cache, tokens, offline mode and the server are by the rules of that library (`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`,
`HF_ENDPOINT`). Nothing that is downloaded is executed.
"""

import contextlib
import glob
import os
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_moe.config.errors import ConfigError, require, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfUri

_FORM = "write hf://ORG/NAME or hf://ORG/NAME@REVISION, and datasets as hf://datasets/ORG/NAME/PATH"


def is_hub(path: Any) -> bool:
    """Whether a path is an `hf://` URL, also as a `Path`, which drops one of the slashes."""
    return str(path).startswith("hf:/")


def is_hub_id(path: Any) -> bool:
    """Whether a path that does not exist here has the form ORG/NAME of a model of the Hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) is not None and not os.path.lexists(path)


def parse_url(url: Any, field: str) -> "HfUri":
    """The parts of an `hf://` URL. Raises `ConfigError` on `field` for one that names no model or dataset."""
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    text = shown(url)
    try:
        uri = parse_hf_uri(text)
    except HfUriError as error:
        raise ConfigError(field, text, f"{error.msg.rstrip('. ')}; {_FORM}") from None
    require(".." not in uri.path_in_repo.split("/"), field, text, f"has .. in its path; {_FORM}")
    require(uri.type in ("model", "dataset"), field, text, f"is a {uri.type}, not a model or a dataset; {_FORM}")
    return uri


def download(url: Any, field: str, patterns: Sequence[str], ignore: str = "*/*") -> Path:
    """The directory of a repository's snapshot in the cache, after the files that match `patterns` are downloaded, by
    default only those of its top level. A file that is there is not downloaded again, and a download that was
    interrupted resumes. Raises `ConfigError` on `field` if there is no such repository or revision, if it may not be
    read, and if the Hub cannot be reached and the cache lacks a file."""
    from huggingface_hub import snapshot_download

    uri = parse_url(url, field)
    with hub_errors(field, url):
        folder = snapshot_download(
            uri.id, repo_type=uri.type, revision=uri.revision, allow_patterns=list(patterns), ignore_patterns=[ignore]
        )
    return Path(folder)


def download_file(url: Any, field: str, default: str, beside: Sequence[str] = ()) -> Path:
    """A file that a URL names, or the file `default` of the repository, with the files `beside` it."""
    uri = parse_url(url, field)
    file = Path(uri.path_in_repo or default)
    names = [str(file.with_name(name)) for name in (file.name, *beside)]
    found = download(url, field, list(map(glob.escape, names)), _deeper(file)) / file
    require(found.is_file(), field, shown(url), f"has no file {file}; name another")
    return found


def download_files(pattern: str, field: str) -> list[str]:
    """Paths in the cache of all files that match a glob below a repository, sorted, without hidden ones; `**` includes
    subfolders. Raises `ConfigError` on `field` if there are none."""
    uri = parse_url(pattern, field)
    path = uri.path_in_repo
    require(path != "", field, pattern, f"is a repository; write {pattern.rstrip('/')}/**/*")
    # In the patterns of the library `*` includes subfolders.
    ignore = ".*" if "**" in path else _deeper(Path(path))
    folder = download(pattern, field, [path.replace("**/", "*"), path], ignore)
    found = glob.glob(os.path.join(glob.escape(str(folder)), path), recursive=True)
    matches = sorted(match for match in found if os.path.isfile(match))
    require(len(matches) > 0, field, pattern, "matches no file of the repository; check the path or quote the glob")
    return matches


def _deeper(path: Path) -> str:
    """The pattern of files in deeper folders than `path`."""
    return "*/" * len(path.parts) + "*"


def shown(url: Any) -> str:
    """A URL with both of its slashes, of which a `Path` drops one."""
    return re.sub("^(hf|s3|gs):/+", r"\1://", str(url))


@contextlib.contextmanager
def hub_errors(field: str, url: Any) -> Generator[None]:
    """Errors of the Hub, in one line each. Those of the disk stay as they are."""
    from huggingface_hub import constants, errors, is_offline_mode

    def fail(message: str) -> ConfigError:
        return ConfigError(field, shown(url), without_secrets(message))

    try:
        yield
    except ConfigError:
        raise
    except errors.GatedRepoError:
        fix = "is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
        raise fail(fix) from None
    except errors.RepositoryNotFoundError:
        raise fail("no such repository, or a private one: check the name, or set HF_TOKEN to a token for it") from None
    except errors.RevisionNotFoundError:
        raise fail("has no such revision; name a branch, a tag or a commit of it") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        missing = "is not in the cache as a whole, and " if cause is not error else ""
        if is_offline_mode():
            raise fail(f"{missing}HF_HUB_OFFLINE forbids requests; unset it, or fill the cache") from None
        if not isinstance(cause, errors.HfHubHTTPError):
            fix = "check the connection, or HF_ENDPOINT"
            raise fail(f"{missing}{constants.ENDPOINT} cannot be reached; {fix}") from None
        status, fix = cause.response.status_code, "try again later"
        if status in (401, 403):
            fix = "log in with `hf auth login`, or set HF_TOKEN to a token that may do this"
        raise fail(f"{missing}{constants.ENDPOINT} responded with status {status}; {fix}") from None
    except (ValueError, LookupError, TypeError) as error:  # of a response, which the library does not check
        fix = f"check the URL, and that {constants.ENDPOINT} is a Hub, not a page of a network to log in"
        raise fail(f"{type(error).__name__}: {error}; {fix}") from None
