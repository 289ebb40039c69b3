"""A repository's objects in S3, Google Cloud Storage or Azure, under one prefix; what talks to stores for all others.

Credentials are those of the platform's usual chain. What a store says no with becomes a sentence without what it says
of itself.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from serving.errors import InvalidRequest, ModelInvalid, NotReady, ServingError, shown

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_CLIENT = ("allow_http", "allow_invalid_certificates", "proxy_ca_certificate", "proxy_excludes", "proxy_url")
_LIKE_A_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_OURS = re.compile(r"(s3|gs|az):/[^/@?#]+(/[^?#]+)?")
_CHUNK = 4 * 1024 * 1024
_MOST = 64 * 1024 * 1024
"""Bytes of an object that is read whole: documents, manifests, and histories of some hundred thousand changes."""

_REFUSED = "the object store refuses the credentials that were found here"

Token: TypeAlias = dict[str, Any]
"""What tells one state of an object from another: an ETag, and a generation where the store counts them."""


class Overtaken(ServingError):
    """A conditional write came too late: the object is another by now, or there already."""


class StoreFailed(NotReady):
    """The store is away, does not answer as it should, or does not let us."""


class Object(NamedTuple):
    """What a listing says of an object: bytes, and what changes with its content."""

    size: int
    tag: str


@dataclass(frozen=True, slots=True)
class Held:
    """A small object, whole, as it was read."""

    content: bytes
    token: Token


def store_url(models: Path) -> str | None:
    """Return the URL that a models folder is given by, where it is one of an object store.

    Raises InvalidRequest for what looks like a URL and is none that is served from, or where packages are missing.

    >>> store_url(Path("s3://bucket/models/")), store_url(Path("models"))
    ('s3://bucket/models', None)
    """
    text = str(models)  # in which pathlib has made one slash of two
    if not _LIKE_A_URL.match(text):
        return None
    if not _OURS.fullmatch(text):
        raise InvalidRequest("--models: write a folder, or s3://, gs:// or az:// and a bucket")
    if find_spec("obstore") is None:
        raise InvalidRequest("--models: object stores need more packages: pip install 'serving[store]'")
    return text.replace(":/", "://", 1)


def open_store(url: str, *, request_s: float = 30.0, retry_s: float = 15.0) -> ObjectStore:
    """Open an object store with the platform's credentials. Raises BaseError, ValueError for a bad URL, StoreFailed.

    request_s: seconds that one request may take, to the last byte of its answer. retry_s: from its beginning, in which
    it is tried again, three times at most.
    """
    from obstore.store import from_url  # noqa: PLC0415  an extra

    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=20),
        "timeout": timedelta(seconds=request_s),
    }
    prefix = _PREFIXES[url.split(":", maxsplit=1)[0]]  # of what obstore reads itself as long as it is given no options
    options |= {name: os.environ[variable] for name in _CLIENT if (variable := prefix + name.upper()) in os.environ}
    retries: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=retry_s)}
    more: Any = {"credential_provider": provider} if (provider := _profile(url)) is not None else {}
    make: Any = from_url  # which is typed for each kind of store
    return cast("ObjectStore", make(url, client_options=options, retry_config=retries, **more))


def _profile(url: str) -> Any:
    """Return what reads AWS's configuration files, as its own tools do, where nothing comes before them."""
    named = ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")
    first = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
    given = any(name in os.environ for name in named) or (Path.home() / ".aws" / "credentials").exists()
    if not url.startswith("s3") or not given or any(name in os.environ for name in first) or find_spec("boto3") is None:
        return None
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415
    from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415

    try:
        return Boto3CredentialProvider()
    except (BotoCoreError, ValueError) as error:
        raise StoreFailed("AWS_PROFILE, or what it and ~/.aws name, gives no credentials") from error


class Bucket:
    """The objects below a URL, by their paths under it. Every method blocks, and raises StoreFailed with a reason."""

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _documents(self) -> ObjectStore:
        with _explained():
            return open_store(self.url, request_s=5, retry_s=5)

    @cached_property
    def _files(self) -> ObjectStore:
        with _explained():
            return open_store(self.url, request_s=4 * 3600, retry_s=3600)

    def list(self, folder: str | None = None) -> dict[str, Object]:
        """Return all objects, or those below a folder, by path."""
        found = {}
        with _explained():
            for page in self._documents.list(folder, chunk_size=1000):
                for each in page:
                    found[each["path"]] = Object(each["size"], each["e_tag"] or str(each["last_modified"]))
        return found

    def read(self, path: str) -> Held | None:
        """Return a small object; None where there is none. Raises ModelInvalid where it is none that is small."""
        try:
            with _explained():
                found = self._documents.get(path)
                meta = found.meta
                if meta["size"] > _MOST:
                    raise ModelInvalid(f"{path} in the object store has {meta['size']} bytes: {_MOST} at most")
                return Held(bytes(found.bytes()), {"e_tag": meta["e_tag"], "version": meta["version"]})
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        """Tell whether there is an object, by asking for it: a listing may be old."""
        try:
            with _explained():
                self._documents.head(path)
        except FileNotFoundError:
            return False
        return True

    def parts(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of a large object. Raises StoreFailed where it is gone."""
        try:
            with _explained():
                for part in self._files.get(path).stream(_CHUNK):
                    yield bytes(part)
        except FileNotFoundError:
            raise StoreFailed("an object has gone from the store") from None

    def write(self, path: str, content: bytes, over: Token | None) -> Token:
        """Write a small object in place of the state that `over` tells, None: where there is none; return its state.

        Raises Overtaken.
        """
        with _explained():
            mode: Any = "create" if over is None else {name: said for name, said in over.items() if said is not None}
            return dict(self._documents.put(path, content, mode=mode))

    def upload(self, path: str, file: Path) -> None:
        """Write a large object."""
        with _explained():
            self._files.put(path, file)

    def delete(self, paths: Iterable[str]) -> None:
        """Remove objects, one after the other; those that are gone are no fault."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError), _explained():
                self._documents.delete(path)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    from obstore.exceptions import (  # noqa: PLC0415
        AlreadyExistsError,
        BaseError,
        InvalidPathError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    try:
        yield
    except (PreconditionError, AlreadyExistsError) as error:
        raise Overtaken("the object has changed meanwhile") from error
    except FileNotFoundError:
        raise
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreFailed(_REFUSED) from error
    except InvalidPathError as error:  # of a listing, which ends there
        key = re.search('[Pp]ath "(.*?)"', str(error))
        name = f" {shown(key[1])!r}" if key else ""
        raise StoreFailed(f"the store has an object{name}, whose name is no path (//, . or ..): remove it") from error
    except (BaseError, OSError, ValueError) as error:
        said = str(error)
        if "403 Forbidden" in said or "401 Unauthorized" in said:  # of a listing there is no error of its own
            raise StoreFailed(_REFUSED) from error
        if "NoSuchBucket" in said or "ContainerNotFound" in said or "bucket does not exist" in said:
            raise StoreFailed("there is no such bucket") from error
        if "169.254." in said or "metadata" in said:
            raise StoreFailed("no credentials for the object store were found here") from error
        raise StoreFailed("the object store does not answer as it should") from error
