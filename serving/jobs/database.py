"""The database of jobs: SQLite in a file, or PostgreSQL. The only owner of engines, sessions and migrations."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from asyncpg import InterfaceError, PostgresError, connect
from sqlalchemy import Connection, Executable, event, make_url, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from serving.errors import NotReady
from serving.jobs.tables import Base

log = logging.getLogger("serving.jobs")

BUSY_S = 5.0
CONNECTIONS = 5
"""Of one worker."""
MIGRATIONS = Path(__file__).parent / "migrations"
_COMMAND_S = 60.0
_UNKNOWN = "does not answer"
_REASONS = {
    ("locked",): "is locked by somebody else",
    ("full", "no space"): "has no space left",
    ("readonly", "read-only"): "can't be written to",
    ("malformed", "not a database"): "is damaged",
}
"""What is the matter, by words of a driver."""
T = TypeVar("T")
_LOCK = 0x73_65_72_76_69_6E_67  # of PostgreSQL's advisory locks


class DatabaseAway(NotReady):
    """The database of jobs can't be asked now; what it holds is as it was."""


class Database:
    """Transactions on the database of jobs.

    url: `sqlite` for a file in `state`, `sqlite:///file` or `postgresql://...`. migrations: alembic's folder.
    busy_s: how long SQLite waits for others' transactions, and a connection for PostgreSQL to answer.
    """

    def __init__(self, url: str, state: Path, *, migrations: Path = MIGRATIONS, busy_s: float = BUSY_S) -> None:
        self._migrations = migrations
        parsed = make_url(f"sqlite:///{state / 'jobs.db'}" if url == "sqlite" else url)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": {"timeout": busy_s}}
        if not self._sqlite:
            # The driver reads the URL itself: it knows sslmode and what else libpq does.
            # A statement, too, must not hang with the network.
            options = {"async_creator": partial(connect, url, timeout=busy_s, command_timeout=_COMMAND_S)}
        self.engine: AsyncEngine = create_async_engine(
            parsed.set(drivername="sqlite+aiosqlite" if self._sqlite else "postgresql+asyncpg"),
            **options,
            pool_pre_ping=True,
            pool_size=CONNECTIONS,
            max_overflow=0,
        )
        if self._sqlite:
            event.listen(self.engine.sync_engine, "connect", self._prepare_sqlite)
            event.listen(self.engine.sync_engine, "checkout", self._same_file)
            event.listen(self.engine.sync_engine, "begin", _begin_sqlite)
        self.up: bool | None = None
        """Whether it answered when it was asked last; None where it was not yet."""
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self._file = Path(parsed.database or "") if self._sqlite else None
        self._ready: object = None
        """What the schema was seen in: the file, as long as that is the same."""
        self._migrating = asyncio.Lock()
        self._at_work: set[asyncio.Future[Any]] = set()
        self._open = 0
        self._at_rest = asyncio.Event()
        self._at_rest.set()

    @asynccontextmanager
    async def transaction(self, *, alone: bool = False) -> AsyncIterator[AsyncSession]:
        """Open a session whose changes are all kept, or none where an exception leaves it.

        alone: one such transaction at a time, whoever asks. Raises DatabaseAway.
        """
        self._open += 1
        self._at_rest.clear()
        try:
            with _translated():
                await self._migrate()
                async with self._sessions.begin() as session:
                    if alone:
                        await session.run_sync(lambda s: self._lock(s.connection()))
                    yield session
        except DatabaseAway as away:
            if self.up is not False:
                reason = str(away.__cause__ or "").split("\n", 1)[0][:200]
                log.error("%s%s", away.message, f" ({reason})" if reason else "")
            self.up = False
            raise
        finally:
            self._open -= 1
            if not self._open:
                self._at_rest.set()
        self.up = True

    async def run(self, change: Callable[[AsyncSession], Awaitable[T]], *, alone: bool = False) -> T:
        """Have a change made in a transaction, to its end also where nobody waits for it any more.

        A driver that is interrupted leaves its connection in a state that nobody knows. Raises DatabaseAway, and what
        `change` raises.
        """

        async def whole() -> T:
            async with self.transaction(alone=alone) as session:
                return await change(session)

        task = asyncio.ensure_future(whole())
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)
        return await asyncio.shield(task)

    async def execute(self, statement: Executable) -> list[Any]:
        """Run one statement by itself; return the first column of what it selects. Raises DatabaseAway."""

        async def change(session: AsyncSession) -> list[Any]:
            result = await session.execute(statement)
            return list(result.scalars()) if statement.is_select else []

        return await self.run(change)

    def _lock(self, connection: Connection) -> None:
        if not self._sqlite:  # where every transaction is alone
            connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _LOCK})

    async def close(self) -> None:
        """Close all connections, when what runs has ended; what takes longer than `BUSY_S` is cut short."""
        # A connection that comes back to a pool that was disposed of is never closed.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BUSY_S):
                await self._at_rest.wait()
        for late in self._at_work:
            late.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)
        await self.engine.dispose()

    async def _migrate(self) -> None:
        """Bring the schema to what this release wants, once. Raises DatabaseAway where a newer one has changed it."""
        if self._is_ready():
            return
        async with self._migrating:
            if self._is_ready():  # by another's doing meanwhile
                return
            async with self.engine.begin() as connection:
                await connection.run_sync(self._upgrade)
            self._ready = self._identity()

    def _is_ready(self) -> bool:
        return self._ready is not None and self._ready == self._identity()

    def _identity(self) -> object:
        """Tell the file from another one of its name; None where there is none."""
        if self._file is None:
            return True
        try:
            return self._file.stat().st_ino
        except OSError:
            return None

    def _prepare_sqlite(self, connection: Any, record: Any) -> None:
        connection.isolation_level = None  # what begins a transaction is said below, and not guessed by the driver
        cursor = connection.cursor()
        cursor.execute("pragma journal_mode = wal")
        cursor.execute("pragma synchronous = full")  # what was answered survives a loss of power
        cursor.execute("pragma foreign_keys = on")
        cursor.close()
        record.info["file"] = self._identity()

    def _same_file(self, _: Any, record: Any, __: Any) -> None:
        if record.info["file"] != self._identity():
            raise DisconnectionError("the file was removed, and this connection still has it")

    def _upgrade(self, connection: Connection) -> None:
        self._lock(connection)
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(self._migrations))
        scripts = ScriptDirectory.from_config(config)
        found = MigrationContext.configure(connection).get_current_revision()
        if found == scripts.get_current_head():
            return
        if found is None:  # all of it is new: made as it is now. A change of a table needs a migration for older ones
            Base.metadata.create_all(connection)
            command.stamp(config, "head")
            return
        if found not in {script.revision for script in scripts.walk_revisions()}:
            raise DatabaseAway(
                f"the database of jobs has the schema of a newer release ({found}): update this server too"
            )
        log.info("the schema of the database of jobs goes from %s to %s", found, scripts.get_current_head())
        command.upgrade(config, "head")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError, TimeoutError, PostgresError, InterfaceError) as error:
        why = _why(error)
        if (
            isinstance(error, DBAPIError)
            and not error.connection_invalidated
            and not isinstance(error, OperationalError)
            and why == _UNKNOWN
        ):
            log.exception("the database of jobs refuses a statement")
        raise DatabaseAway(f"the database of jobs {why}: try again later") from error


def _why(error: BaseException) -> str:
    """Say what is the matter, without what a driver says of hosts and files."""
    said = str(error).lower()
    return next((why for words, why in _REASONS.items() if any(word in said for word in words)), _UNKNOWN)


def _begin_sqlite(connection: Connection) -> None:
    # Immediate: a transaction that reads first, and then can't get the lock to write, would have to be repeated.
    connection.exec_driver_sql("begin immediate")
