"""Model threads that answer by themselves, while clients do all that a connection can do to them meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
from random import Random
from typing import Any, NamedTuple

import grpc
import numpy as np
import onnxruntime as ort

from serving.protocols.messages import SERVICE, message
from tests.conftest import MODELS, Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.hostile_grpc import grpc_port

NAMES = ("iris/1", "breast_cancer/1", "diabetes/1")
ROWS = 48
INFER = f"/{SERVICE}/ModelInfer"
Request, Response = message("ModelInferRequest"), message("ModelInferResponse")
_RESET = struct.pack("ii", 1, 0)
_ids = itertools.count()


class Case(NamedTuple):
    """A row for a model, and the numbers that onnxruntime alone makes of it."""

    model: str
    row: list[float]
    due: np.ndarray[Any, Any]

    def body(self) -> bytes:
        """Write the request as JSON."""
        tensor = {"name": "features", "datatype": "FP32", "shape": [1, len(self.row)], "data": self.row}
        return json.dumps({"inputs": [tensor]}).encode()

    def message(self) -> bytes:
        """Write the request as protobuf, with an id of its own."""
        request = Request(model_name=self.model.split("/")[0], model_version=self.model.split("/")[1])
        request.id = f"g{next(_ids)}"
        request.inputs.add(name="features", datatype="FP32", shape=[1, len(self.row)])
        request.raw_input_contents.append(np.array(self.row, np.float32).tobytes())
        return bytes(request.SerializeToString())


def cases(random: Random) -> list[list[Case]]:
    """Make rows for each model, and their answers."""
    made = []
    for name in NAMES:
        session = ort.InferenceSession(str(MODELS / name / "model.onnx"), providers=["CPUExecutionProvider"])
        width, output = session.get_inputs()[0].shape[1], session.get_outputs()[-1].name
        rows = [[round(random.uniform(0, 8), 2) for _ in range(width)] for _ in range(ROWS)]
        due = [session.run([output], {"features": np.array([row], np.float32)})[0] for row in rows]
        made.append([Case(name, row, one) for row, one in zip(rows, due, strict=True)])
    return made


class Tally:
    """What the clients saw."""

    def __init__(self) -> None:
        self.right = self.wrong = self.unanswered = 0

    def http(self, case: Case, identity: str, status: int, headers: dict[str, str], body: bytes) -> None:
        """Compare an answer: whose it is, and what it says."""
        outputs = json.loads(body)["outputs"] if status == 200 else []
        same = bool(outputs) and np.allclose(outputs[-1]["data"], case.due.ravel(), rtol=1e-4, atol=1e-5)
        if same and headers.get("x-request-id") == identity:
            self.right += 1
        else:
            self.wrong += 1

    def grpc(self, case: Case, sent: bytes, made: bytes) -> None:
        """Compare an answer: whose it is, and what it says."""
        response = Response.FromString(made)
        found = np.frombuffer(response.raw_output_contents[-1], np.float32)
        if response.id == Request.FromString(sent).id and np.allclose(found, case.due.ravel(), rtol=1e-4, atol=1e-5):
            self.right += 1
        else:
            self.wrong += 1


class Client:
    """A client of one model over HTTP that does whatever comes to its mind."""

    def __init__(self, server: Server, choices: list[Case], tally: Tally, seed: int) -> None:
        self._server, self._cases, self._tally, self._random = server, choices, tally, Random(seed)
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def run(self, rounds: int) -> None:
        """Do so many things."""
        for _ in range(rounds):
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
            deed = self._random.choice([self._ask, self._ask, self._ask, self._pipeline, self._leave, self._half])
            try:
                await asyncio.wait_for(deed(), 20)
            except (TimeoutError, OSError, asyncio.IncompleteReadError):
                self._tally.unanswered += 1
                self._drop()
        if self._writer is not None:
            self._drop()

    def _request(self) -> tuple[bytes, Case, str]:
        case, identity = self._random.choice(self._cases), f"h{next(_ids)}"
        name, version = case.model.split("/")
        body = case.body()
        head = f"POST /v2/models/{name}/versions/{version}/infer HTTP/1.1\r\nhost: x\r\nx-request-id: {identity}\r\n"
        return head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body), case, identity

    async def _answer(self, case: Case, identity: str) -> None:
        head = ["HTTP/1.1 100"]
        while head[0].split()[1] == "100":  # the server asks so whether a client that says no more is still there
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self._reader.readexactly(int(headers["content-length"]))
        self._tally.http(case, identity, int(head[0].split()[1]), headers, body)

    async def _ask(self) -> None:
        sent, case, identity = self._request()
        assert self._writer is not None
        cut = self._random.randrange(len(sent)) if self._random.random() < 0.2 else 0
        self._writer.write(sent[:cut])
        await asyncio.sleep(0)
        self._writer.write(sent[cut:])
        await self._answer(case, identity)

    async def _pipeline(self) -> None:
        asked = [self._request() for _ in range(self._random.randint(2, 4))]
        assert self._writer is not None
        if self._random.random() < 0.5:
            self._writer.write(b"".join(sent for sent, _, _ in asked))
        else:
            for sent, _, _ in asked:
                self._writer.write(sent)
                await asyncio.sleep(self._random.choice([0, 0, 0.0002]))
        for _, case, identity in asked:
            await self._answer(case, identity)

    async def _leave(self) -> None:
        assert self._writer is not None
        self._writer.write(self._request()[0])
        await asyncio.sleep(self._random.choice([0, 0.0001, 0.0005]))
        self._drop(reset=self._random.random() < 0.5)

    async def _half(self) -> None:
        sent, case, identity = self._request()
        assert self._writer is not None
        self._writer.write(sent)
        self._writer.write_eof()
        await self._answer(case, identity)
        if await self._reader.read():
            self._tally.wrong += 1
        self._drop()

    def _drop(self, *, reset: bool = False) -> None:
        writer, self._writer = self._writer, None
        assert writer is not None
        if reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort() if reset else writer.close()


async def _calls(server: Server, choices: list[Case], tally: Tally, seed: int, rounds: int) -> None:
    """Make calls of one model over gRPC; some are cancelled, some have company on their connection."""
    random = Random(seed)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port(server)}", options=options) as channel:
        infer = channel.unary_unary(INFER)
        for _ in range(rounds):
            picked = [random.choice(choices) for _ in range(random.choice([1, 1, 1, 2, 5]))]
            sent = [case.message() for case in picked]
            calls = [infer(one, timeout=20) for one in sent]
            if random.random() < 0.15:
                await asyncio.sleep(random.choice([0, 0.0002]))
                calls[0].cancel()
            for case, one, call in zip(picked, sent, calls, strict=True):
                try:
                    tally.grpc(case, one, await call)
                except asyncio.CancelledError:
                    continue
                except grpc.aio.AioRpcError:
                    tally.unanswered += 1


async def _all(server: Server, tally: Tally, clients: int, rounds: int, *, calls: bool) -> None:
    made = cases(Random(5))
    tasks = [
        Client(server, choices, tally, 100 * i + n).run(rounds)
        for i, choices in enumerate(made)
        for n in range(clients)
    ]
    if calls:
        tasks += [_calls(server, choices, tally, 7 + i, rounds) for i, choices in enumerate(made)]
    await asyncio.gather(*tasks)


async def _successors(server: Server, times: int) -> int:
    """Reset a connection while its model runs, and take the socket's number for another; count those sent something."""
    case, found = cases(Random(1))[0][0], 0
    name, body = case.model.partition("/")[0], case.body()
    for _ in range(times):
        with socket.create_connection(("127.0.0.1", server.port)) as left:
            left.sendall(
                b"POST /v2/models/%b/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
                % (name.encode(), len(body), body)
            )
            await asyncio.sleep(0.02)
            left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        await asyncio.sleep(0.02)
        others = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(4)]
        done, waiting = await asyncio.wait([asyncio.ensure_future(r.read(1)) for r, _ in others], timeout=0.2)
        found += bool(done)
        for task in waiting:
            task.cancel()
        for _, writer in others:
            writer.close()
    return found


@drill(
    "lent_sockets", "an answer that a model's thread writes itself is its caller's, whole and once, whatever clients do"
)
def lent_sockets(report: Report, *, clients: int = 3, rounds: int = 3000) -> None:
    """With threads that take turns every microsecond; the control does not take a lent socket back."""
    for slow in (0.0, 0.002):
        some = rounds if not slow else max(rounds // 10, 40)
        faults: dict[str, object] = {"switch": 1e-6, "slow": slow} if slow else {"switch": 1e-6}
        with faulty(faults, "--grpc-port", "0", "--log-format", "json") as server:
            tally = Tally()
            asyncio.run(_all(server, tally, clients, some, calls=True))
            text = f"of {tally.right:,}, batches {'slow' if slow else 'quick'}"
            report.exactly("answers that are another's, or wrong", tally.wrong, 0, text)
            report.exactly("requests without an answer", tally.unanswered, 0, text)
            report.at_least("answers", tally.right, some)
            report.exactly("lines of the log that tell of a fault", server.output().count('"level": "error"'), 0)
    for off in ([], ["recover"]):
        with faulty({"off": off, "slow": 0.1}) as server:
            found = asyncio.run(_successors(server, 10))
        if not off:
            report.exactly("strangers who are sent an answer, for they have the socket's number, of 10", found, 0)
        else:
            report.control(f"of sockets that are not taken back {found} are", found > 0)
