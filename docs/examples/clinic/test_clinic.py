"""The clinic's tests: with the real models, and with fakes where an answer is to be what the test needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import serving
from clinic import main, staff
from clinic.database import Patient, Staff

MODELS = Path(__file__).parents[3] / "models"
SERUM = {"s1": 163.0, "s2": 98.4, "s3": 43.0, "s4": 4.0, "s5": 4.6821, "s6": 101.0}
VISIT = {"patient": 7, "bmi": 36.1, "bp": 115.0}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The application with a database of its own, one member of staff and one patient."""
    folder = tmp_path_factory.mktemp("clinic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLINIC_DATABASE", f"sqlite+aiosqlite:///{folder}/clinic.db")
        patch.setenv("SERVING_MODELS", str(MODELS))
        patch.setenv("SERVING_KEYS", f"machine predict {hashlib.sha256(b'machine-key').hexdigest()}")
        with TestClient(main.app) as made:
            assert made.portal is not None
            made.portal.call(_fill)
            yield made


async def _fill() -> None:
    async with main.app.state.sessions() as session:
        session.add(Staff(name="ada", salt=b"salt", password=staff.hashed("right", b"salt")))
        session.add(Patient(number=7, age=54.0, sex=2.0, serum=SERUM))
        await session.commit()


@pytest.fixture(scope="module")
def ada(client: TestClient) -> dict[str, str]:
    """The header of somebody who has logged in."""
    answer = client.post("/token", data={"username": "ada", "password": "right"})
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


@pytest.fixture(scope="module")
def biopsy(client: TestClient) -> dict[str, float]:
    """A biopsy as the model has it for an example: benign."""
    described = client.get("/ml/v1/models/breast_cancer", headers={"Authorization": "Bearer machine-key"})
    features: dict[str, float] = described.json()["example"]
    return features


def test_a_visit_is_assessed_with_what_is_known_of_the_patient(
    client: TestClient, ada: dict[str, str], biopsy: dict[str, float]
) -> None:
    """Both models answer one request: measurements of today, and the blood test of before."""
    made = client.post("/visits", json={**VISIT, "biopsy": biopsy}, headers=ada)
    assert made.status_code == 201
    assert made.json()["progression"] == pytest.approx(232.48569)
    assert made.json()["malignant"] == pytest.approx(0.003695488, rel=1e-4)
    assert made.json()["models"] == {"diabetes": "1", "breast_cancer": "1"}
    kept = client.get(f"/visits/{made.json()['visit']}", headers=ada).json()
    assert (kept["progression"], kept["letter"]) == (made.json()["progression"], None)


def test_a_biopsy_that_lacks_a_feature_is_refused_by_name(
    client: TestClient, ada: dict[str, str], biopsy: dict[str, float]
) -> None:
    """What the model does not take is told as it would be over HTTP, and nothing is kept."""
    lacking = {name: value for name, value in biopsy.items() if name != "mean area"}
    refused = client.post("/visits", json={**VISIT, "biopsy": lacking}, headers=ada)
    assert refused.status_code == 422
    assert refused.json()["details"] == [{"path": "/instances/0/mean area", "message": "is missing"}]


def test_a_worrying_biopsy_leads_to_a_letter(client: TestClient, ada: dict[str, str]) -> None:
    """The letter is written once the answer is sent; the model is a fake, and says what the test needs."""
    fake = serving.FakePredictor({"label": "malignant", "probabilities": {"malignant": 0.9, "benign": 0.1}})
    main.app.dependency_overrides[serving.predictor("breast_cancer")] = lambda: fake
    try:
        made = client.post("/visits", json={**VISIT, "biopsy": {"mean area": 1.0}}, headers=ada)
    finally:
        main.app.dependency_overrides.clear()
    assert fake.asked[0].rows == {"mean area": 1.0}
    assert made.json()["malignant"] == 0.9
    kept = client.get(f"/visits/{made.json()['visit']}", headers=ada)
    assert kept.json()["letter"] == "Dear patient 7, please call ada."


def test_a_model_that_is_too_slow_is_said_so(client: TestClient, ada: dict[str, str]) -> None:
    """An error of a model's has its status, as it has over HTTP."""
    fake: Any = serving.FakePredictor(serving.QueueFull("busy", retry_after=3))
    main.app.dependency_overrides[serving.predictor("diabetes")] = lambda: fake
    try:
        refused = client.post("/visits", json=VISIT, headers=ada)
    finally:
        main.app.dependency_overrides.clear()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")


def test_people_log_in_and_programs_have_keys(client: TestClient, ada: dict[str, str]) -> None:
    """A token of the clinic's opens its own routes, and a key of the model server's the models; neither the other's."""
    rows = {"instances": [{"age": 54, "sex": 2, "bmi": 36.1, "bp": 115, **SERUM}]}
    machine = {"Authorization": "Bearer machine-key"}
    assert client.post("/token", data={"username": "ada", "password": "wrong"}).status_code == 401
    assert client.post("/token", data={"username": "bob", "password": "right"}).status_code == 401
    for headers, visits, models in (({}, 401, 401), (ada, 201, 401), (machine, 401, 200)):
        assert client.post("/visits", json=VISIT, headers=headers).status_code == visits
        assert client.post("/ml/v1/models/diabetes:predict", json=rows, headers=headers).status_code == models
    assert client.get("/ml/v2/health/ready").status_code == 200
