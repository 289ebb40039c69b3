"""Who is asking: OAuth2 with a password, for people; programs that predict have keys of the model server's own."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import jwt
from anyio import to_thread
from fastapi import APIRouter, Depends, HTTPException
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from pydantic import BaseModel

from clinic.database import Session, Staff

SECRET = os.environ.get("CLINIC_SECRET") or secrets.token_hex()
"""Signs tokens; to be set where there are several workers."""

router = APIRouter(tags=["staff"])
_scheme = OAuth2PasswordBearer("token")


class Token(BaseModel):
    """As OAuth2 wants it."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105  no password, as OAuth2 has it


def hashed(password: str, salt: bytes) -> bytes:
    """Hash a password; slow on purpose, so not on the event loop."""
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


def _matches(form: OAuth2PasswordRequestForm, found: Staff | None) -> bool:
    salt, due = (found.salt, found.password) if found is not None else (b"", b"")  # as slow for a name that is not
    return hmac.compare_digest(hashed(form.password, salt), due)


async def log_in(form: Annotated[OAuth2PasswordRequestForm, Depends()], session: Session) -> Staff:
    """Check a name and a password."""
    found = await session.get(Staff, form.username)
    if not await to_thread.run_sync(_matches, form, found) or found is None:
        raise HTTPException(401, "name or password is wrong", {"WWW-Authenticate": "Bearer"})
    return found


@router.post("/token")
async def token(who: Annotated[Staff, Depends(log_in)]) -> Token:
    """Log in."""
    claims = {"sub": who.name, "exp": datetime.now(UTC) + timedelta(hours=8)}
    return Token(access_token=jwt.encode(claims, SECRET, "HS256"))


async def current_staff(token: Annotated[str, Depends(_scheme)], session: Session) -> Staff:
    """Give who sent a token."""
    try:
        name = jwt.decode(token, SECRET, ["HS256"])["sub"]
    except jwt.InvalidTokenError:
        name = None
    found = await session.get(Staff, name) if name is not None else None
    if found is None:
        raise HTTPException(401, "log in first", {"WWW-Authenticate": "Bearer"})
    return found


CurrentStaff = Annotated[Staff, Depends(current_staff)]
