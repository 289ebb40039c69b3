"""Visits to a clinic: what is measured, with what the database knows of the patient, goes to two models at once.

serving run --app clinic.main:app --models models --workers 4
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from pydantic import BaseModel

import serving
from clinic.database import Patient, Session, Sessions, Visit, connected
from clinic.staff import CurrentStaff
from clinic.staff import router as staff_router

WORRYING = 0.5
"""Probability from which somebody is written a letter."""

models = serving.lifespan()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Have the database and the models for as long as the application runs."""
    async with connected(app), models(app):
        yield


app = FastAPI(title="Clinic", lifespan=lifespan)
app.include_router(staff_router)
app.include_router(serving.router, prefix="/ml")
app.add_exception_handler(serving.ServingError, serving.error_response)

Progression = Annotated[serving.Predictor, Depends(serving.predictor("diabetes"))]
Biopsies = Annotated[serving.Predictor, Depends(serving.predictor("breast_cancer"))]


class Measured(BaseModel):
    """What a visit brings."""

    patient: int
    bmi: float
    bp: float
    biopsy: dict[str, float] | None = None
    """The thirty features of the model of biopsies, where there was one."""


class Assessment(BaseModel):
    """What the models say."""

    visit: int
    progression: float
    malignant: float | None
    models: dict[str, str]


@app.post("/visits", status_code=201)
async def visit(  # noqa: PLR0917  FastAPI passes them by name
    measured: Measured,
    staff: CurrentStaff,
    session: Session,
    sessions: Sessions,
    later: BackgroundTasks,
    progression: Progression,
    biopsies: Biopsies,
) -> Assessment:
    """Assess a patient, keep the visit, and write a letter afterwards where there is reason to worry."""
    patient = await session.get(Patient, measured.patient)
    if patient is None:
        raise HTTPException(404, f"there is no patient {measured.patient}")
    row = {"age": patient.age, "sex": patient.sex, "bmi": measured.bmi, "bp": measured.bp, **patient.serum}
    course, biopsy = await asyncio.gather(
        progression.answer(row, timeout=1),
        asyncio.sleep(0) if measured.biopsy is None else biopsies.answer(measured.biopsy, timeout=1),
    )
    kept = Visit(
        patient=patient.number,
        seen_by=staff.name,
        progression=course.predictions,
        malignant=None if biopsy is None else biopsy.predictions["probabilities"]["malignant"],
        models={answer.model: answer.version for answer in (course, biopsy) if answer is not None},
    )
    session.add(kept)
    await session.commit()
    if kept.malignant is not None and kept.malignant >= WORRYING:
        later.add_task(write_letter, sessions, kept.number)
    return Assessment(visit=kept.number, progression=kept.progression, malignant=kept.malignant, models=kept.models)


async def write_letter(sessions: Sessions, number: int) -> None:
    """Write to the patient of a visit; with a session of its own, for the request's has ended."""
    async with sessions() as session:
        kept = await session.get_one(Visit, number)
        kept.letter = f"Dear patient {kept.patient}, please call {kept.seen_by}."
        await session.commit()


class Kept(Assessment):
    """A visit of the past."""

    letter: str | None


@app.get("/visits/{number}")
async def past_visit(number: int, staff: CurrentStaff, session: Session) -> Kept:
    """Look a visit up."""
    kept = await session.get(Visit, number)
    if kept is None:
        raise HTTPException(404, f"there is no visit {number}")
    return Kept(
        visit=kept.number,
        progression=kept.progression,
        malignant=kept.malignant,
        models=kept.models,
        letter=kept.letter,
    )
