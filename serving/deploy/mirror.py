"""A local folder that is kept at what a repository in an object store says; all else reads and watches the folder.

A version is downloaded beside it, compared with its manifest, and renamed into place. Where the store is slow, wrong or
away the folder stays as it is, and what is loaded serves on. A listing is a hint: what it lacks is asked for by name
before it goes, and what has a role stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias

from serving.deploy.delete import AWAY, roles_of
from serving.deploy.remote_versions import fetch
from serving.errors import ModelInvalid, NotReady, ServingError
from serving.linux.files import rename_to_free, sync, write_whole
from serving.linux.thread_scheduling import give_way
from serving.repository import manifest, state_directory
from serving.repository.history import HISTORY_FILE
from serving.repository.manifest import MANIFEST_FILE, MODEL_FILE
from serving.repository.model_settings import SETTINGS_FILE
from serving.repository.object_store import Object, store_url
from serving.repository.remote_traffic import SOURCE_FILE, RemoteTraffic
from serving.repository.repository import NAME, VERSION, Problem
from serving.repository.traffic import TRAFFIC_FILE, current
from serving.repository.traffic_store import TrafficStore
from serving.repository.triton_config import CONFIG_FILE

log = logging.getLogger("serving.mirror")

POLL_S = 5.0
MOST_S = 60.0
"""Most seconds between two tries of what fails."""
AT_ONCE = 4
"""Versions that are downloaded at a time."""

Key: TypeAlias = tuple[str, str]
Files: TypeAlias = dict[str, Object]


class _Failed(NamedTuple):
    """A version that could not be taken: as it was listed, why, how often, and when to try again."""

    files: Files
    reason: str
    tries: int
    due: float


class _Model(NamedTuple):
    """What was listed of one model: files by their path within it, and within each version."""

    documents: Files
    versions: dict[str, Files]


def located(models: Path, state_dir: Path | None) -> tuple[Path, Path | None]:
    """Return the folder of a repository and its state folder: of one in an object store those that mirror it here.

    Raises InvalidRequest for a URL that can't be served from, NotReady where there can't be such a folder.
    """
    url = store_url(models)
    if url is None:
        return models, state_dir
    try:
        state = (
            state_directory.url_state_folder(url)
            if state_dir is None
            else state_directory.state_folder(models, state_dir)
        )
        root = state_directory.subfolder(state_directory.subfolder(state, "mirrors"), state_directory.url_key(url))
        if not (root / SOURCE_FILE).exists():
            write_whole(root / SOURCE_FILE, url.encode())
    except OSError as error:
        raise NotReady(
            f"there is no place for what comes from {url}: {error.strerror}; name one with --state-dir"
        ) from None
    return root, state


def mirrored(
    models: Path, state_dir: Path | None, only: str | None = None, *, say: Callable[[str], object]
) -> tuple[Path, Path | None]:
    """Return what `located` does, brought up to date, of one model or all.

    say: is told where the store can't be read, and what came from it before has to do. Raises what `located` does, and
    NotReady where nothing did.
    """
    root, state = located(models, state_dir)
    if root != models and (mirror := Mirror.of(root, state)) is not None:
        try:
            mirror.pull(only)
        except NotReady as error:
            if not mirror.holds(only):
                raise NotReady(f"{store_url(models)}: {error.message}") from None
            say(f"{store_url(models)}: {error.message}; what came from there before is taken")
        except OSError as error:
            raise NotReady(f"what comes from {store_url(models)} can't be written here: {error.strerror}") from None
    return root, state


class Mirror:
    """Brings one folder that `located` has made to what the store says: `pull` once, `follow` on and on.

    poll_s: seconds between two listings, give or take a quarter, so that many servers do not ask at the same moment.
    """

    def __init__(self, store: TrafficStore, remote: RemoteTraffic, state: Path, *, poll_s: float = POLL_S) -> None:
        self._poll_s = poll_s
        self._store, self._remote, self.bucket = store, remote, remote.bucket
        self._root, self._state = store.root, state
        self._tags: dict[Key, object] = {}
        """Of documents as they were taken last, by model and file."""
        self._listed: dict[Key, Files] = {}
        self._running: set[Key] = set()
        self._done: SimpleQueue[tuple[Key, Files, str]] = SimpleQueue()
        self._failed: dict[Key, _Failed] = {}
        self._wake = threading.Event()
        self._ended = False
        self._first = True
        self.problems: tuple[Problem, ...] = ()
        """What of the store is not followed, and why; replaced and never changed, for other threads."""

    @classmethod
    def of(cls, root: Path, state_dir: Path | None, *, poll_s: float = POLL_S) -> Mirror | None:
        """Return the mirror whose folder this is; None for any other folder."""
        store = TrafficStore(root, state_dir)
        return None if store.remote is None or state_dir is None else cls(store, store.remote, state_dir, poll_s=poll_s)

    def holds(self, only: str | None) -> bool:
        """Tell whether there is anything in the folder, or one model."""
        names = self._store.names()
        return bool(names) if only is None else only in names

    def follow(self, moved: Callable[[], None]) -> None:
        """Pull again and again, until `close`, on the calling thread. moved: called where `problems` change."""
        give_way()
        failures, wait = 0, self._poll_s
        while not self._ended:
            self._wake.wait(wait * random.uniform(0.75, 1.25))  # noqa: S311
            self._wake.clear()
            before = self.problems
            try:
                self.pull(wait=False)
                if failures > 1:
                    log.warning("the object store is back: what it says is followed again")
                failures, wait = 0, self._poll_s
            except (ServingError, OSError) as error:
                failures += 1
                wait = min(MOST_S, self._poll_s * 2**failures)
                reason = error.message if isinstance(error, ServingError) else f"{error.strerror}".lower()
                if failures > 1:  # once is not yet away
                    away = Problem("", "", f"{reason}; what came from it before serves on")
                    self.problems = (away, *(problem for problem in before if problem.name))
            except Exception:  # what is there serves on, and the next pass starts afresh
                log.exception("the mirror failed")
            if self.problems != before:
                moved()

    def close(self) -> None:
        """End `follow`; a download that is in progress is left behind."""
        self._ended = True
        self._wake.set()

    def pull(self, only: str | None = None, *, wait: bool = True) -> None:
        """Take what is new, of one model or all. wait: until all versions are here that can be had.

        Raises NotReady where the store can't be read, OSError where the folder can't be written.
        """
        models = _by_model(self.bucket.list(only))
        if only is None and not models and self._store.names():
            raise NotReady("the object store holds no model at all")
        problems: list[Problem] = []
        self._collect()
        while True:
            problems = [
                Problem(name, version, reason)
                for name, model in models.items()
                for version, files in model.versions.items()
                if (reason := self._consider(name, version, model))
            ]
            if not (wait and self._running):
                break
            self._collect(wait=True)
        for name, model in models.items():
            if (self._root / name).is_dir():
                try:
                    coming = {
                        v
                        for v in model.versions
                        if (name, v) not in self._failed and not (self._root / name / v).is_dir()
                    }
                    self._take_documents(name, model.documents, self._root / name, coming)
                except NotReady:
                    raise
                except ServingError as error:
                    problems.append(Problem(name, "", error.message))
        problems += self._drop(models, only)
        self._listed = {(name, v): files for name, model in models.items() for v, files in model.versions.items()}
        self._failed = {key: failed for key, failed in self._failed.items() if key in self._listed}
        self._first = False
        self.problems = tuple(problems)

    def _consider(self, name: str, version: str, model: _Model) -> str:
        """Begin to download a version where that is due; say why it is not here, or not as it is in the store."""
        key, files, now = (name, version), model.versions[version], time.monotonic()
        folder = self._root / name / version
        if folder.is_dir():
            self._failed.pop(key, None)
            if _differs(folder, files):
                return "its objects are others by now: a version never changes, publish the next one"
            return ""
        failed = self._failed.get(key)
        if failed is not None and failed.files == files and now < failed.due:
            return failed.reason
        if key in self._running:
            return failed.reason if failed is not None else ""
        if MANIFEST_FILE not in files and not self._first and self._listed.get(key) != files:
            return f"it has no {MANIFEST_FILE}, so it waits until nothing in it changes any more"
        if len(self._running) < AT_ONCE:
            self._running.add(key)
            threading.Thread(target=self._download, args=(key, model), name="download", daemon=True).start()
        return failed.reason if failed is not None else ""

    def _collect(self, *, wait: bool = False) -> None:
        """Take note of downloads that have ended."""
        while self._running and (wait or not self._done.empty()):
            key, files, reason = self._done.get()
            wait = False
            self._running.discard(key)
            if reason:
                tries = self._failed[key].tries + 1 if key in self._failed and self._failed[key].files == files else 1
                delay = min(MOST_S, self._poll_s * 2**tries) * random.uniform(0.75, 1.25)  # noqa: S311
                self._failed[key] = _Failed(files, reason, tries, time.monotonic() + delay)
                log.warning("%s %s: %s", *key, reason)

    def _download(self, key: Key, model: _Model) -> None:
        name, version = key
        files, reason = model.versions[version], ""
        staged: Path | None = None
        try:
            give_way()
            state_directory.sweep(self._state / "staging")
            staged = state_directory.staging_folder(self._state) / name
            (staged / version).mkdir(parents=True)
            fetch(self.bucket, f"{name}/{version}", files, staged / version)
            for inner, _, _ in os.walk(staged / version, topdown=False):
                sync(Path(inner))
            self._into_place(name, version, model, staged)
            log.info("%s %s is here from the object store", *key)
        except ServingError as error:
            reason = error.message
        except OSError as error:
            reason = f"it can't be written here: {error.strerror}"
        except Exception:
            log.exception("the mirror failed at %s %s", *key)
            reason = "it can't be taken"
        finally:
            if staged is not None:
                shutil.rmtree(staged.parent, ignore_errors=True)
        self._done.put((key, files, reason))
        self._wake.set()

    def _into_place(self, name: str, version: str, model: _Model, staged: Path) -> None:
        home = self._root / name
        if not home.exists():
            # A new model comes with its settings: nobody may be answered whom they do not allow.
            self._take_documents(name, model.documents, staged, ())
            try:
                rename_to_free(staged, home)
                sync(self._root)
                return
            except FileExistsError:
                for file in (SETTINGS_FILE, CONFIG_FILE, TRAFFIC_FILE):
                    self._tags.pop((name, file), None)
        with contextlib.suppress(FileExistsError):  # somebody on this machine was faster
            rename_to_free(staged / version, home / version)
            sync(home)

    def _take_documents(self, name: str, files: Files, folder: Path, coming: Collection[str]) -> None:
        for file in (SETTINGS_FILE, CONFIG_FILE):
            tag = files[file].tag if file in files else None
            if self._tags.get((name, file)) == tag and (tag is not None or not (folder / file).exists()):
                continue
            held = self.bucket.read(f"{name}/{file}")
            if held is not None:
                write_whole(folder / file, held.content)
            else:
                (folder / file).unlink(missing_ok=True)
            self._tags[name, file] = tag
        tags = [files[file].tag for file in (HISTORY_FILE, TRAFFIC_FILE) if file in files]
        if not tags or self._tags.get((name, TRAFFIC_FILE)) == tags:
            return
        if self._remote.install(name, folder, coming=coming):
            self._tags[name, TRAFFIC_FILE] = tags

    def _drop(self, models: Mapping[str, _Model], only: str | None) -> list[Problem]:
        """Remove what has gone from the store; what it has a role for stays, and is a problem."""
        problems = []
        for name in self._store.names() if only is None else [only]:
            listed = models[name].versions if name in models else {}
            with contextlib.suppress(ServingError, FileNotFoundError):  # another process does the same
                for version in self._store.versions(name):
                    if version in listed or self.bucket.exists(f"{name}/{version}/{MODEL_FILE}"):
                        continue
                    traffic = self._store.read(name, anyway=True)
                    if name in models and roles_of(version, traffic, current(traffic, self._store.versions(name))):
                        problems.append(
                            Problem(name, version, "it has gone from the store, and what is here serves on")
                        )
                        continue
                    log.warning("%s %s has gone from the store", name, version)
                    _remove(self._root / name / version)
                if name not in models and not self._store.versions(name):
                    _remove(self._root / name)
        return problems


def _remove(folder: Path) -> None:
    """Remove a folder that others may be reading: all of it is gone from under its name at once."""
    away = folder.with_name(f"{AWAY}{secrets.token_hex(8)}")
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _differs(folder: Path, files: Files) -> bool:
    """Tell whether a version's objects have other sizes than its files."""
    try:
        here = manifest.read(folder)
    except ModelInvalid:
        return False
    return here is not None and any(name in files and files[name].size != e.size for name, e in here.files.items())


def _by_model(objects: Mapping[str, Object]) -> dict[str, _Model]:
    """Sort a listing; what has no place in a repository is left out."""
    found: dict[str, _Model] = {}
    for path, facts in objects.items():
        name, *rest = path.split("/")
        if not NAME.fullmatch(name) or not rest:
            continue
        model = found.setdefault(name, _Model({}, {}))
        if len(rest) == 1:
            model.documents[rest[0]] = facts
        elif VERSION.fullmatch(rest[0]):
            model.versions.setdefault(rest[0], {})["/".join(rest[1:])] = facts
    return found
