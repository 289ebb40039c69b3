"""What the Open Inference Protocol promises of tensors, over fast path, ASGI and gRPC alike: one suite over all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from serving.access.key_store import KeyStore
from tests.conftest import MODELS, Server, running
from tests.drills.hostile_grpc import grpc_port

ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3], [5.9, 3.0, 4.2, 1.5]], np.float32)
# What an error is in each transport: HTTP's status, gRPC's code.
KINDS = {
    "400": "invalid",
    "StatusCode.INVALID_ARGUMENT": "invalid",
    "404": "not found",
    "StatusCode.NOT_FOUND": "not found",
    "429": "full",
    "StatusCode.RESOURCE_EXHAUSTED": "full",
    "504": "late",
    "StatusCode.DEADLINE_EXCEEDED": "late",
    "401": "who",
    "StatusCode.UNAUTHENTICATED": "who",
}


@dataclass
class Refused(Exception):
    """What a transport said instead of an answer."""

    kind: str
    text: str


class Asker:
    """Asks over one transport, with Triton's own client."""

    def __init__(self, transport: str, server: Server, key: str | None = None) -> None:
        self._module: Any = triton_grpc if transport == "grpc" else triton_http
        address = f"127.0.0.1:{grpc_port(server) if transport == 'grpc' else server.port}"
        self._client = self._module.InferenceServerClient(address)
        # The fast path leaves what comes from another origin to the application.
        self._headers = {"Origin": "https://example.org"} if transport == "asgi" else {}
        if key is not None:
            self._headers["authorization" if transport == "grpc" else "Authorization"] = f"Bearer {key}"

    def __call__(
        self, model: str, tensors: dict[str, Any], *, outputs: tuple[str, ...] = (), version: str = "", **options: Any
    ) -> Any:
        """Return the answer. Raises Refused."""
        inputs = []
        for name, array in tensors.items():
            datatype = {"f": "FP32", "i": "INT64", "O": "BYTES"}[array.dtype.kind]
            inputs.append(self._module.InferInput(name, list(array.shape), datatype))
            inputs[-1].set_data_from_numpy(array)
        wanted = [self._module.InferRequestedOutput(name) for name in outputs] or None
        try:
            return self._client.infer(
                model, inputs, model_version=version, outputs=wanted, headers=self._headers, **options
            )
        except InferenceServerException as error:
            raise Refused(KINDS.get(error.status(), error.status()), error.message()) from None

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[Server]:
    with running("--grpc-port", "0", "--max-queued-rows", "5000") as started:
        yield started


@pytest.fixture(params=["fast_path", "asgi", "grpc"])
def ask(request: pytest.FixtureRequest, servers: Server) -> Iterator[Asker]:
    asker = Asker(request.param, servers)
    yield asker
    asker.close()


def test_the_answer_is_what_onnxruntime_says(ask: Asker) -> None:
    """Numbers and strings come back as the model makes them, in the order of the rows, with the model's names."""
    session = ort.InferenceSession(str(MODELS / "iris" / "2" / "model.onnx"), providers=["CPUExecutionProvider"])
    due = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"features": ROWS}), strict=True))
    answer = ask("iris", {"features": ROWS}, request_id="mine")
    response = answer.get_response(as_json=True) if hasattr(answer.get_response(), "id") else answer.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("iris", "2", "mine")
    assert [text.decode() if isinstance(text, bytes) else text for text in answer.as_numpy("label")] == list(
        due["label"]
    )
    np.testing.assert_allclose(answer.as_numpy("probabilities"), due["probabilities"], rtol=1e-5)


def test_only_what_is_asked_for_is_answered(ask: Asker) -> None:
    """Outputs come as requested, and a class with its score where a classification is asked for."""
    answer = ask("iris", {"features": ROWS}, outputs=("probabilities",))
    assert answer.as_numpy("probabilities").shape == (3, 3)
    assert answer.as_numpy("label") is None


def test_a_version_is_asked_by_its_number(ask: Asker) -> None:
    """Each version answers for itself; one that there is not is named, with those that there are."""
    one, two = (ask("iris", {"features": ROWS}, version=v).as_numpy("probabilities") for v in ("1", "2"))
    assert not np.array_equal(one, two)
    with pytest.raises(Refused) as refused:
        ask("iris", {"features": ROWS}, version="9")
    assert (refused.value.kind, "versions: 1, 2" in refused.value.text) == ("not found", True)


def test_an_unknown_model_is_named(ask: Asker) -> None:
    """Asking for a model that is not served says so, and names those that are; a slash in a name is no version."""
    for name in ("nobody", "iris/2"):
        with pytest.raises(Refused) as refused:
            ask(name, {"features": ROWS})
        assert refused.value.kind == "not found"
    with pytest.raises(Refused, match="iris"):
        ask("nobody", {"features": ROWS})


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"others": ROWS}, "features"),
        ({"features": ROWS[:, :3]}, "/inputs/0"),
        ({"features": ROWS.astype(np.int64)}, "FP32"),
        ({"features": ROWS * np.float32(np.nan)}, "/inputs/0"),
        ({}, "features"),
    ],
)
def test_a_bad_tensor_is_named(ask: Asker, tensors: dict[str, Any], text: str) -> None:
    """What does not fit the model is invalid, in words that name the place or what is wanted; the server goes on."""
    with pytest.raises(Refused) as refused:
        ask("iris", tensors)
    assert refused.value.kind == "invalid"
    assert text in refused.value.text
    ask("iris", {"features": ROWS})


def test_what_could_not_be_answered_in_time_is_late(ask: Asker) -> None:
    """A request that allows itself no time is told so, or to come back; it is never answered late."""
    with pytest.raises(Refused) as refused:
        ask("iris", {"features": np.repeat(ROWS, 1000, axis=0)}, timeout=1)  # a microsecond
    assert refused.value.kind in ("late", "full")


def test_more_rows_than_the_queue_holds_are_refused(ask: Asker) -> None:
    """A request that could never find room says so, instead of waiting for ever."""
    with pytest.raises(Refused, match="5000"):
        ask("iris", {"features": np.repeat(ROWS, 2000, axis=0)})


def test_long_requests_have_the_same_answers(ask: Asker) -> None:
    """What is read and written elsewhere than on the event loop is answered as what is short."""
    short = ask("digits", {"image": np.arange(64, dtype=np.float32).reshape(1, 8, 8)}).as_numpy("probabilities")
    many = np.repeat(np.arange(64, dtype=np.float32).reshape(1, 8, 8), 4000, axis=0)
    long = ask("digits", {"image": many}).as_numpy("probabilities")
    np.testing.assert_allclose(long, np.repeat(short, 4000, axis=0), rtol=1e-5)


def test_no_rows_are_answered_with_none(ask: Asker) -> None:
    """A tensor of no rows is answered with outputs of no rows."""
    assert ask("iris", {"features": ROWS[:0]}).as_numpy("probabilities").shape == (0, 3)


def test_who_has_no_key_learns_nothing(tmp_path: Path) -> None:
    """Where keys are set, a prediction without a good one is refused, whatever it asks for; with it, it is answered."""
    key = KeyStore(tmp_path / "serving.keys").create("app", frozenset({"predict"}))
    with running("--grpc-port", "0", "--keys", str(tmp_path / "serving.keys")) as server:
        for transport in ("fast_path", "asgi", "grpc"):
            for given in (None, "wrong"):
                asker = Asker(transport, server, given)
                for model in ("iris", "nobody"):
                    with pytest.raises(Refused) as refused:
                        asker(model, {"features": ROWS})
                    assert refused.value.kind == "who"
                asker.close()
            asker = Asker(transport, server, key)
            assert asker("iris", {"features": ROWS}).as_numpy("probabilities").shape == (3, 3)
            asker.close()
