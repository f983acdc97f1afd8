"""Files of Hub repositories: what there is, and downloads that are compared with the Hub's hashes.

They go into the Hub's own cache (`HF_HUB_CACHE`), which other programs share. huggingface_hub resumes a connection
that breaks and keeps every file that is whole; a file that a killed process was at begins anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils.sha import git_hash


class DownloadError(RuntimeError):
    """Something between here and the Hub failed; in one line, and nothing half-written is left."""


@dataclass(frozen=True)
class HubFile:
    """A file at one commit of a repository."""

    repo: str
    path: str
    commit: str
    size: int
    """Bytes."""
    sha256: str | None
    """Of a large file."""
    git_sha1: str | None
    """Of any other."""

    @property
    def is_cached(self) -> bool:
        return isinstance(try_to_load_from_cache(self.repo, self.path, revision=self.commit), str)


def list_files(repo: str, patterns: Sequence[str]) -> list[HubFile]:
    """The files of a repository's newest commit that match the patterns.

    Raises:
        DownloadError: the Hub cannot be reached or has no such repository, or nothing matches one of the patterns.
    """
    with _in_one_line(repo):
        info = HfApi().model_info(repo, files_metadata=True)
    found = [
        HubFile(
            repo,
            sibling.rfilename,
            str(info.sha),
            sibling.size or 0,
            sibling.lfs.sha256 if sibling.lfs else None,
            None if sibling.lfs else sibling.blob_id,
        )
        for sibling in info.siblings or []
        if any(fnmatchcase(sibling.rfilename, pattern) for pattern in patterns)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(file.path, pattern) for file in found):
            raise DownloadError(f"the repository '{repo}' has no file '{pattern}' any more")
    return found


def download(file: HubFile) -> Path:
    """Get a file into the Hub's cache unless it is there, and compare it with its hash.

    Raises:
        DownloadError: the Hub cannot be reached, or the file is damaged; it is then removed from the cache.
        OSError: the disk is full or not writable.
    """
    with _in_one_line(f"{file.repo}/{file.path}"):
        path = Path(hf_hub_download(file.repo, file.path, revision=file.commit))
    if file.sha256 is not None:
        with path.open("rb") as content:
            found, expected = hashlib.file_digest(content, "sha256").hexdigest(), file.sha256
    else:
        found, expected = git_hash(path.read_bytes()), file.git_sha1 or ""
    if expected and found != expected:
        path.resolve().unlink()  # the blob that the path is a link to
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"'{file.path}' of '{file.repo}' is damaged: its hash is {found[:12]}…, the Hub says {expected[:12]}…; it "
            "was removed, pull again"
        )
    return path


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Let everything that the Hub's client raises for reasons of the network or the Hub be a `DownloadError`."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings of single attempts; the last one raises
    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(
            f"'{what}' is open only to those who accepted its terms on {constants.ENDPOINT}; do so, and log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"{constants.ENDPOINT} has no repository for '{what}', or it is private") from error
    except RemoteEntryNotFoundError as error:
        raise DownloadError(f"{constants.ENDPOINT} has no '{what}'") from error
    except HfHubHTTPError as error:
        raise DownloadError(f"{constants.ENDPOINT} answered {error.response.status_code} for '{what}'") from error
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"'{what}' is not in the Hub's cache and HF_HUB_OFFLINE is set; unset it") from error
    except (httpx2.HTTPError, LocalEntryNotFoundError, XetDownloadError) as error:
        raise DownloadError(
            f"cannot get '{what}' from {constants.ENDPOINT}; check the network and pull again, what is whole is kept"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DownloadError(f"the download of '{what}' is not as long as the Hub says; pull again") from error
    finally:
        logger.setLevel(level)
