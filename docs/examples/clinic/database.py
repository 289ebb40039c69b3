"""The clinic's tables, and a session for each request."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from sqlalchemy import JSON, ForeignKey
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Base of the tables."""


class Staff(Base):
    """Who may log in."""

    __tablename__ = "staff"

    name: Mapped[str] = mapped_column(primary_key=True)
    salt: Mapped[bytes]
    password: Mapped[bytes]
    """Its scrypt hash."""


class Patient(Base):
    """What is known of a patient before a visit."""

    __tablename__ = "patients"

    number: Mapped[int] = mapped_column(primary_key=True)
    age: Mapped[float]
    sex: Mapped[float]
    serum: Mapped[dict[str, float]] = mapped_column(JSON)
    """The last blood test: s1 to s6."""


class Visit(Base):
    """What was measured, and what the models said."""

    __tablename__ = "visits"

    number: Mapped[int] = mapped_column(primary_key=True)
    patient: Mapped[int] = mapped_column(ForeignKey("patients.number"))
    seen_by: Mapped[str] = mapped_column(ForeignKey("staff.name"))
    progression: Mapped[float]
    malignant: Mapped[float | None]
    models: Mapped[dict[str, str]] = mapped_column(JSON)
    """Which version of each model said it."""
    letter: Mapped[str | None]
    """Written after the answer was sent."""


@asynccontextmanager
async def connected(app: FastAPI) -> AsyncIterator[None]:
    """Keep a pool of connections while an application runs, and make the tables that are missing."""
    engine = create_async_engine(os.environ.get("CLINIC_DATABASE", "sqlite+aiosqlite:///clinic.db"))
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
        yield
    finally:
        await engine.dispose()


def sessions_of(request: Request) -> async_sessionmaker[AsyncSession]:
    """Give what makes sessions, also for what runs after the request."""
    sessions: async_sessionmaker[AsyncSession] = request.app.state.sessions
    return sessions


Sessions = Annotated[async_sessionmaker[AsyncSession], Depends(sessions_of)]


async def session_of(sessions: Sessions) -> AsyncIterator[AsyncSession]:
    """Give a session that ends with the request."""
    async with sessions() as session:
        yield session


Session = Annotated[AsyncSession, Depends(session_of)]
