"""Broken requests: each is refused with a reason, or is still valid and answered as onnxruntime answers."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from tests.conftest import ROOT, Server, running
from tests.drills import mutants, protocol
from tests.drills.differential import flipped, same_grpc, same_v2
from tests.drills.direct import Direct, gathered
from tests.drills.drill import Report, drill
from tests.drills.wire import Answer, Connection, grpc_channel, resident, workers

REFUSED, ANSWERED = "refused", "answered"
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,  # of a model or version whose name was broken
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # of more rows or bytes than are taken
}
SLOW_S = 0.2
LEAKS = (b"Traceback", str(ROOT).encode(), b".py", b"pid")
INFER = "/inference.GRPCInferenceService/ModelInfer"


@drill("mutation", "a broken request is a 4xx or INVALID_ARGUMENT, or still valid and answered right; nothing grows")
def run(report: Report, *, requests: int = 10_000, timed: bool = True) -> None:
    """Send so many mutants, 7 of 10 over HTTP, the others over gRPC, to one worker."""
    with tempfile.TemporaryDirectory() as folder:
        models = gathered(Path(folder))
        with running("--grpc-port", "0", models=Path(folder)) as server:
            call = grpc_channel(server).unary_unary(
                INFER, response_deserializer=service_pb2.ModelInferResponse.FromString
            )
            pids = workers(server)
            tally = Tally(models)
            tally.send(server, call, range(requests // 5))
            before = resident(pids[0])
            tally.send(server, call, range(requests // 5, requests))
            grown = resident(pids[0]) - before
            report.exactly(
                "worker processes, the same before and after", float(pids == workers(server) and len(pids)), 1
            )
    report.at_least("mutated requests", sum(tally.verdicts.values()), requests)
    report.at_least("refused with a reason", tally.verdicts[REFUSED], requests / 4)
    report.at_least("still valid, and answered as onnxruntime answers", tally.verdicts[ANSWERED], requests / 20)
    report.exactly("anything else: 5xx, hang, wrong answer or wrong refusal", len(tally.wrong), 0)
    report.at_most("growth of the worker's resident memory", grown, 32, "MiB")
    if timed:
        report.at_most("slowest answer, the best of three", max(tally.seconds) * 1000, SLOW_S * 1000, "ms")
        report.at_most("answers asked for again", tally.again, requests / 1000)
    report.control(
        "a server that answers 500 is found out each time", _stub_is_found(models, b"500 Oops", b'{"error":"x"}')
    )
    report.control(
        "a server that answers 200 to anything is found out", _stub_is_found(models, b"200 OK", b'{"outputs":[]}')
    )
    report.control("an answer with one bit turned is found out each time", tally.turned_seen == tally.turned > 0)
    for text in tally.wrong[:8]:
        print(text[:3000])


class Tally:
    """Sends mutants and counts the verdicts on their answers."""

    def __init__(self, models: dict[str, Direct]) -> None:
        self._models = models
        self._list = list(models.values())
        self.verdicts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.turned = self.turned_seen = self.again = 0

    def send(self, server: Server, call: Any, numbers: range) -> None:
        """Send the mutants of these numbers."""
        http = Connection(server.port)
        for number in numbers:
            if number % 10 < 7:
                self.over_http(number, http)
            else:
                self._over_grpc(number, call)
        http.close()

    def over_http(self, number: int, http: Connection) -> None:
        """Send one over HTTP; one that lies about its length gets a connection of its own."""
        mutant = mutants.over_http(self._list, number)

        def ask() -> Answer:
            if mutant.sent is None:
                return http.ask(mutant.wire)
            http.close()
            answer = http.ask(mutant.wire, end=not _holds(mutant))
            http.close()
            return answer

        answer = self._timed(ask)
        try:
            body = mutant.body[: int(mutant.sent)] if mutant.sent is not None and _holds(mutant) else mutant.body
            protocol.check(mutant.sent is None or _holds(mutant), "Content-Length")
            feeds, names = protocol.http(mutant.model, mutant.headers, body)
            due = _ran(mutant.model, feeds)
        except protocol.Invalid as error:
            verdict = self._refusal(answer, str(error), closed=mutant.sent is not None)
        else:
            verdict = self._answer(
                answer.status == 200,
                due,
                _places(mutant.model, names),
                lambda d: same_v2(mutant.model, d, answer, names),
            )
        self._note(f"HTTP {number} ({mutant.kind})", verdict, mutant, answer)

    def _timed(self, ask: Callable[[], Any]) -> Any:
        """Ask, and note how long it took; what took long is asked again, since other processes may have been why."""
        spent = []
        while len(spent) < 3 and (not spent or min(spent) > SLOW_S):
            began = time.perf_counter()
            answer = ask()
            spent.append(time.perf_counter() - began)
        self.seconds.append(min(spent))
        self.again += len(spent) - 1
        return answer

    def _refusal(self, answer: Answer, why: str, *, closed: bool) -> str:
        if closed and answer.status == 0:
            return REFUSED  # it never became a whole request
        if not 400 <= answer.status < 500:
            return f"should be refused for its {why}"
        if any(leak in answer.body for leak in LEAKS):
            return "says too much"
        if answer.headers["content-type"].startswith("text/plain"):
            return REFUSED if closed else "is no HTTP, it is said"  # uvicorn's own word on what is no HTTP
        return REFUSED if json.loads(answer.body)["error"] else "says nothing"

    def _answer(self, answered: bool, due: list[Any], places: set[int], same: Any) -> str:
        if not answered:
            return "is valid, and refused"
        turned = flipped(due, places)
        if turned is not None:
            self.turned += 1
            self.turned_seen += not same(turned)
        return ANSWERED if same(due) else "answered wrongly"

    def _over_grpc(self, number: int, call: Any) -> None:
        kind, message = mutants.over_grpc(self._list, number)

        def ask() -> Any:
            try:
                return call(message, timeout=20)
            except grpc.RpcError as error:
                return error

        answer = self._timed(ask)
        refused = isinstance(answer, grpc.RpcError)
        try:
            model, feeds, names = protocol.grpc(self._models, message)
            due = _ran(model, feeds)
        except protocol.Invalid as error:
            if not refused or answer.code() not in REFUSALS:
                verdict = f"should be refused for its {error}"
            else:
                verdict = "says too much" if any(x in answer.details().encode() for x in LEAKS) else REFUSED
        else:
            verdict = self._answer(
                not refused, due, _places(model, names), lambda d: same_grpc(model, d, answer, names)
            )
        self._note(f"gRPC {number} ({kind})", verdict, message, answer)

    def _note(self, name: str, verdict: str, sent: object, answer: object) -> None:
        self.verdicts[verdict] += 1
        if verdict not in (REFUSED, ANSWERED):
            self.wrong.append(f"{name}: {verdict}\n  sent {str(sent)[:1200]}\n  got {str(answer)[:600]}")


def _holds(mutant: mutants.Mutant) -> bool:
    """Tell whether a body is at least as long as is announced."""
    sent = mutant.sent or ""
    return sent.isdigit() and int(sent) <= len(mutant.body)


def _places(model: Direct, names: list[str]) -> set[int]:
    return {index for index, port in enumerate(model.outputs) if port.name in names}


def _ran(model: Direct, feeds: dict[str, Any]) -> list[Any]:
    try:
        return model(feeds)
    except Exception as error:
        raise protocol.Invalid("values, by the model") from error


def _stub_is_found(models: dict[str, Direct], status: bytes, body: bytes) -> bool:
    """Send mutants to a server that answers all of them alike; tell whether each verdict is bad."""
    tally = Tally(models)
    with stub(
        b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)
    ) as port:
        for number in range(40):
            http = Connection(port)
            tally.over_http(number, http)
            http.close()
    return len(tally.wrong) == 40


@contextlib.contextmanager
def stub(answer: bytes) -> Iterator[int]:
    """Answer `answer` to whatever comes, once a connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):  # the client has left
                    connection.recv(1 << 20)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 20):
                        pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
