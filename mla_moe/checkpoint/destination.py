"""Where a new checkpoint is written: a directory, a bucket, or a commit to the Hugging Face Hub."""

import contextlib
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mla_moe.checkpoint.files import CheckpointError, atomic_directory, check
from mla_moe.checkpoint.hub import INDEX, parse_model
from mla_moe.config.errors import without_secrets
from mla_moe.config.hub import hub_errors, is_hub, shown
from mla_moe.config.storage import is_url, open_url, storage_errors, upload_object


@contextlib.contextmanager
def new_directory(path: str | Path) -> Generator[tuple[Path, Callable[[Path], None]]]:
    """A directory for the files of a new checkpoint, and a function that is told each large file that is finished.

    `path` exists when the block succeeds, and not if it fails: `atomic_directory`, one commit to a repository of the
    Hub, or a directory in a bucket, whose last object is `config.json`. At a URL, files are uploaded and removed as
    they are finished, so that the host needs room for one."""
    if is_url(path):
        with _hub_commit(path) if is_hub(path) else _bucket_directory(path) as directory_and_finish:
            yield directory_and_finish
    else:
        with atomic_directory(Path(path)) as directory:
            yield directory, lambda file: None


@contextlib.contextmanager
def _hub_commit(url: Any) -> Generator[tuple[Path, Callable[[Path], None]]]:
    """A new repository is private. Weights that it had and that are not written again are removed in the same
    commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    uri, api = parse_model(url, "path"), HfApi()
    additions: dict[str, CommitOperationAdd] = {}

    def upload(file: Path) -> None:
        addition = additions[file.name] = CommitOperationAdd(file.name, file)
        with _upload_errors(url):
            api.preupload_lfs_files(uri.id, [addition], revision=uri.revision)
        if addition.path_or_fileobj == b"":  # as the library leaves what is uploaded
            file.unlink()

    with _upload_errors(url):
        api.create_repo(uri.id, private=True, exist_ok=True)
        if uri.revision:
            api.create_branch(uri.id, branch=uri.revision, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mla_moe-hub-") as temporary:
        yield Path(temporary), upload
        for file in sorted(Path(temporary).iterdir()):
            additions.setdefault(file.name, CommitOperationAdd(file.name, file))
        with _upload_errors(url):
            parent = api.repo_info(uri.id, revision=uri.revision).sha
            former = set(api.list_repo_files(uri.id, revision=parent)) - additions.keys()
            stale = [name for name in sorted(former) if name == INDEX or Path(name).match("*.safetensors")]
            operations = [*additions.values(), *map(CommitOperationDelete, (name for name in stale if "/" not in name))]
            message = "Upload a checkpoint with mla_moe"  # refused after another push, whose weights would stay there
            api.create_commit(uri.id, operations, commit_message=message, revision=uri.revision, parent_commit=parent)


@contextlib.contextmanager
def _bucket_directory(url: Any) -> Generator[tuple[Path, Callable[[Path], None]]]:
    """Readers need `config.json`, which is written last. What is there when the block fails is removed."""
    fs, root = open_url(url, "path")
    with storage_errors("path", url):
        check(not fs.exists(root), "path", shown(url), "exists already; choose another or remove it")
    written: list[str] = []

    def upload(file: Path) -> None:
        written.append(target := f"{root}/{file.name}")
        with ThreadPoolExecutor(1) as pool:  # after Ctrl-C the client goes on: its end is waited for
            pool.submit(upload_object, fs, file, target, "path", url).result()
        file.unlink()

    try:
        with tempfile.TemporaryDirectory(prefix="mla_moe-bucket-") as temporary:
            yield Path(temporary), upload
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "config.json"):
                upload(file)
    except BaseException:
        for target in written:
            with contextlib.suppress(Exception):  # the error that led here is the one to report
                fs.rm_file(target)
        raise


@contextlib.contextmanager
def _upload_errors(url: Any) -> Generator[None]:
    try:
        with hub_errors("path", url):
            yield
    except RuntimeError as error:  # in which the library wraps whatever ends an upload
        cause = without_secrets(str(error.__cause__ or error))
        fix = "nothing is committed; check the connection and start again"
        raise CheckpointError("path", shown(url), f"the upload failed: {cause}; {fix}") from None
