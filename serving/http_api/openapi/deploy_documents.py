"""The documents of publishing and of a model's traffic, as the OpenAPI document describes them."""

from __future__ import annotations

from pydantic import Field

from serving.gate.report import Report
from serving.http_api.openapi.documents import Document, Error
from serving.repository.traffic import Traffic


class ServedRoles(Document):
    """What this server serves of a model."""

    generation: int
    stable: str
    canary: str | None
    shadow: str | None
    labels: dict[str, str]
    """Versions by label."""
    loaded: list[str]


class ScoreDifference(Document):
    """How far the scores of a shadow are from those of the version that answered."""

    mean: float | None
    rows_up_to: dict[str, int]
    """Rows by the greatest difference that they are within."""


class ShadowFigures(Document):
    """How the copies of live requests went."""

    compared: int
    failed: int
    busy: int
    incompatible: int
    agreement: float | None
    """Share of the rows with the same label, 0 to 1."""
    score_difference: ScoreDifference
    mean_seconds: float | None


class VersionFigures(Document):
    """What a version did since the server started."""

    predictions: int
    rows: int
    errors: int
    error_rate: float | None
    mean_seconds: float | None
    shadow: ShadowFigures | None = None
    """Left out where it was no shadow."""


class TrafficState(Document):
    """Who gets a model's traffic, and how it goes."""

    name: str
    versions: list[str]
    serving: ServedRoles | None
    problem: str
    """Why what is asked for is not served; empty where it is."""
    figures: dict[str, VersionFigures] = Field({})
    """By version, while one is tried."""
    generation: int
    traffic: Traffic


class TrafficChanged(Document):
    """What is asked for after a change."""

    name: str
    notes: list[str] = Field([])
    unknown: list[str] = Field([])
    """Servers that have not said whether they serve it."""
    generation: int
    traffic: Traffic


class HistoryEntry(Document):
    """A change, or a publication, which has no generation, before and after."""

    when: str
    who: str
    what: str
    why: str
    generation: int | None
    before: Traffic | None
    after: Traffic | None


class TrafficHistory(Document):
    """Who changed a model's traffic, oldest first."""

    name: str
    history: list[HistoryEntry]


class Publication(Document):
    """A version that is in the folder."""

    name: str
    version: str
    new: bool
    """Whether it was not there before."""
    answers: str | None
    """The version that callers get who name none: publishing moves no traffic."""
    report: Report


class Deletion(Document):
    """A version that is no more."""

    name: str
    version: str
    generation: int
    """Of the model's traffic, which is otherwise as it was."""


class PublicationRefused(Document):
    """Why the gate lets a version not serve."""

    error: str
    report: Report


class ChangedMeanwhile(Error):
    """Somebody's change came first."""

    current: Traffic
    """What is asked for now."""
