"""What a client does when it gets no answer: it comes back when asked to, and repeats nothing that may have run."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import serving
from serving.bulk.remote import Remote
from serving.client import grpc_transport, refusals
from serving.client.conversation import Conversations, Infer, Pause, Received, Request
from serving.client.open_inference import Outputs
from serving.client.refusals import ConnectionFailed, Refused, refusal
from serving.client.retries import Retries
from serving.errors import Detail, GenerationConflict
from serving.grpc_api import status as grpc_status
from serving.http_api import answer as http_status
from tests.client.conftest import Told

ROW = [5.1, 3.5, 1.4, 0.2]
RIGHT = b'{"model_name":"iris","model_version":"2","predictions":["setosa"]}'
OK = (200, {}, RIGHT)


def _refused(status: int, **headers: str) -> Refused:
    return refusal(status, {name.replace("_", "-"): value for name, value in headers.items()}, b'{"error":"no"}')


def _talk(conversation: Any, *heard: Any) -> list[Any]:
    """Hold a conversation: what is heard in turn, pauses apart; return what it yields, and its error at the end."""
    said: list[Any] = []
    answers: Iterator[Any] = iter(heard)
    step = conversation.send(None)
    try:
        while True:
            said.append(step)
            answer = None if isinstance(step, Pause) else next(answers)
            step = conversation.throw(answer) if isinstance(answer, Refused) else conversation.send(answer)
    except StopIteration:
        return said
    except serving.ServingError as error:
        return [*said, error]


def _predicting(*, most: int = 2, repeat: bool = False, timeout: float = 30) -> Any:
    made = Conversations(timeout=timeout, retries=Retries(most, repeat), grpc=False)
    return made.predict("iris", [ROW], version=None, label=None, timeout=None)


def test_retry_after_is_honoured() -> None:
    """A full queue is asked again after the seconds that it says, and at once given up if that is past the deadline."""
    first, pause, second = _talk(_predicting(), _refused(429, retry_after="7"), Received({}, RIGHT))
    assert (first.path, pause, second.path) == (second.path, Pause(7.0), first.path)
    *_, error = _talk(_predicting(timeout=5), _refused(429, retry_after="7"))
    assert isinstance(error, serving.QueueFull)
    assert error.retry_after == 7


def test_pauses_grow_where_none_is_asked_for() -> None:
    """Without Retry-After each pause is longer, and the last error is the caller's."""
    said = _talk(_predicting(most=3), *[_refused(503)] * 4)
    pauses = [step.seconds for step in said if isinstance(step, Pause)]
    assert len(pauses) == 3
    assert 0 < pauses[0] < 0.11 < pauses[1] * 1.2
    assert pauses == sorted(pauses)
    assert isinstance(said[-1], serving.NotReady)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422, 500, 502, 504])
def test_what_would_be_refused_again_is_not_repeated(status: int) -> None:
    """Only 429 and 503 are asked again; 5xx that may come after a run only where that was allowed."""
    assert [type(step) for step in _talk(_predicting(), _refused(status))][:-1] == [Request]
    again = _talk(_predicting(repeat=True), _refused(status), Received({}, RIGHT))
    assert len(again) == (3 if status >= 500 else 2)


def test_the_deadline_goes_along_and_shrinks() -> None:
    """Each attempt tells the server the seconds that are left of the whole call."""
    said = _talk(_predicting(timeout=9), _refused(429, retry_after="0"), Received({}, RIGHT))
    first, second = (float(step.headers["X-Request-Timeout"]) for step in said if isinstance(step, Request))
    assert 8 < second < first <= 9


def test_a_call_without_time_is_over_before_it_is_sent() -> None:
    """With no time left nothing is sent."""
    with pytest.raises(serving.DeadlineExceeded):
        _predicting(timeout=0).send(None)


@pytest.mark.parametrize("repeat", [False, True])
def test_a_lost_answer_is_repeated_only_where_told(told: Told, repeat: bool) -> None:
    """The connection closes before the answer: the prediction may have run, and runs twice only for who allows it."""
    told.answers = [None, OK]
    with serving.Client(told.url, repeat=repeat) as client:
        if repeat:
            assert client.predict("iris", [ROW]) == ["setosa"]
        else:
            with pytest.raises(serving.AnswerLost):
                client.predict("iris", [ROW])
    assert len(told.asked) == (2 if repeat else 1)


def test_connections_are_used_again(told: Told) -> None:
    """Many predictions of one client go over one connection, with its key; without one no credential is sent."""
    told.answers = [OK] * 6
    with serving.Client(told.url, api_key="secret") as client:
        for _ in range(5):
            client.predict("iris", [ROW])
    assert len(told.connections) == 1
    assert {headers["authorization"] for _, headers in told.asked} == {"Bearer secret"}
    with serving.Client(told.url) as client:
        client.predict("iris", [ROW])
    assert "authorization" not in told.asked[-1][1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_timeout_is_of_the_whole_call(told: Told, asynchronous: bool) -> None:
    """An answer that comes in small pieces, each in time, is given up when the call's time is over."""
    told.answers, told.piece = [OK], 4

    async def ask() -> Any:
        async with serving.AsyncClient(told.url, timeout=0.5, retries=0) as client:
            return await client.predict("iris", [ROW])

    with serving.Client(told.url, timeout=0.5, retries=0) as client, pytest.raises(serving.DeadlineExceeded):
        asyncio.run(ask()) if asynchronous else client.predict("iris", [ROW])


@pytest.mark.parametrize(
    "given", [{"timeout": float("inf")}, {"timeout": float("nan")}, {"api_key": "ä"}, {"api_key": "a\n"}]
)
def test_what_can_be_no_header_is_refused_by_its_name(given: dict[str, Any]) -> None:
    """What a client is told and no request could carry is an error that names it."""
    with pytest.raises(serving.InvalidRequest, match=next(iter(given))), serving.Client(**given) as client:
        client.predict("iris", [ROW])


def test_what_leads_to_no_server_is_refused() -> None:
    """An address with a port that is none, and a key that no header takes, are errors of ours, to files' client too."""
    with pytest.raises(serving.InvalidRequest, match="port"), serving.Client("http://127.0.0.1:bad") as client:
        client.predict("iris", [ROW])
    with pytest.raises(serving.InvalidRequest, match="SERVING_API_KEY"):
        Remote("http://127.0.0.1", "a\n", "iris", None)


def test_a_fork_has_connections_of_its_own(told: Told) -> None:
    """Two processes on one connection would read each other's answers."""
    told.answers = [OK] * 2
    with serving.Client(told.url) as client:
        client.predict("iris", [ROW])
        child = os.fork()
        if child == 0:
            os._exit(client.predict("iris", [ROW]) != ["setosa"])
        assert os.waitpid(child, 0)[1] == 0
    assert len(told.connections) == 2


def test_errors_cross_processes() -> None:
    """An error of a pool's worker arrives as what it was."""
    error = serving.QueueFull("full", 7)
    error.add_note("request id: 1")
    for one in (
        error,
        GenerationConflict("late", {"generation": 3}),
        serving.SignatureMismatch("no", [Detail("/a", "b")]),
    ):
        again = pickle.loads(pickle.dumps(one))
        assert (type(again), again.args, vars(again)) == (type(one), one.args, vars(one))


def test_nobody_there_is_a_failed_connection() -> None:
    """A port without a server is ConnectionFailed after the retries, for rows and for tensors over gRPC."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with serving.Client(f"http://{address}", retries=0) as client, pytest.raises(serving.ConnectionFailed):
            client.predict("iris", [ROW])
        said = _talk(_predicting(), Refused(ConnectionFailed("nobody")), Received({}, RIGHT))
        assert [type(step) for step in said] == [Request, Pause, Request]


@pytest.mark.parametrize(
    ("code", "text", "error", "again"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", serving.ConnectionFailed, True),
        ("UNAVAILABLE", "Stream removed (Socket closed)", serving.AnswerLost, False),
        ("UNAVAILABLE", "model 'iris' is unloaded", serving.NotReady, False),
        ("RESOURCE_EXHAUSTED", "the queue is full", serving.QueueFull, True),
        ("DEADLINE_EXCEEDED", "the deadline passed", serving.DeadlineExceeded, False),
        ("INTERNAL", "it failed", serving.ServerFailed, False),
    ],
)
def test_grpc_is_repeated_only_where_nothing_ran(
    code: str, text: str, error: type[serving.ServingError], again: bool
) -> None:
    """Of gRPC's statuses only a failed connection and a full queue, which says when to come back, are asked again."""

    class Status:
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode[code]

        def details(self) -> str:
            return text

        def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
            return (("retry-after", "1"),) if code == "RESOURCE_EXHAUSTED" else ()

    refused = grpc_transport.refused(Status())
    assert type(refused.error) is error
    assert (Retries().pause(refused, 1, 30) is not None) == again
    assert (Retries(repeat=True).pause(refused, 1, 30) is not None) == (again or refused.ran)


def test_what_is_no_model_server_is_told_so(told: Told) -> None:
    """A page of another server, or a proxy's error page, gives an error of ours that says so."""
    told.answers = [(200, {}, b"<html>hello"), (502, {}, b"<html>bad gateway"), (418, {}, b"{}")]
    with serving.Client(told.url) as client:
        for kind, text in (
            (serving.ServerFailed, "address"),
            (serving.ServerFailed, "502"),
            (serving.InvalidRequest, "418"),
        ):
            with pytest.raises(kind, match=text):
                client.predict("iris", [ROW])


def _signature(version: str, *names: str) -> Received:
    features = [{"name": name, "datatype": "FP32"} for name in names]
    given = {"name": "x", "datatype": "FP32", "shape": [-1, len(names)]}
    made = {"inputs": [given], "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}], "layout": "matrix"}
    document = {"version": version, "features": features, "a field of a later server": 1, **made}
    return Received({}, json.dumps(document).encode())


def test_a_version_that_takes_other_inputs_never_answers_for_them() -> None:
    """Where the model has changed meanwhile, tensors that may have meant something else are sent again by name."""
    made = Conversations(timeout=30, retries=Retries(), grpc=True)
    array = np.array([[1.0, 2.0]])
    talk = made.predict("m", array, version=None, label=None, timeout=None)
    outputs = Outputs("2", {"y": np.zeros(1, np.float32)})
    by_name = Received({}, b'{"model_version":"2","outputs":[5.0]}')
    said = _talk(talk, _signature("1", "a", "b"), outputs, _signature("2", "b", "a"), by_name)
    assert isinstance(said[1], Infer)
    assert json.loads(said[-1].body) == {"inputs": {"a": [1.0], "b": [2.0]}}


def test_every_error_of_the_server_has_its_type_in_the_client() -> None:
    """The client's tables from statuses to errors are the server's, turned around."""
    back = {status: {k for k, s in http_status.STATUS.items() if s == status} for status in http_status.STATUS.values()}
    for status, kinds in back.items():
        if status not in (409, 412):  # a change of traffic, which a client does not make
            assert refusals.STATUS[status] in kinds
    for code, kind in grpc_transport.STATUS.items():
        assert grpc_status.STATUS[kind].name == code.name
    assert isinstance(_refused(422).error, serving.InferenceFailed)
