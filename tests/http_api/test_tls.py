"""TLS and mutual TLS, for HTTP and gRPC, as the clients that people have see them."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx2 as httpx
import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from serving.tls import TlsInvalid, server_context
from tests.conftest import MODELS, Server, running

ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.1, 5.6, 2.4], [5.9, 3.0, 4.2, 1.5]], np.float32)
_PREDICT = "/v2/models/iris/infer"


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a folder of its own."""

    folder: Path

    @property
    def pem(self) -> Path:
        return self.folder / "ca.pem"

    def issue(self, name: str) -> tuple[Path, Path]:
        """Return a certificate of 127.0.0.1 and its key."""
        cert, key, request = (self.folder / f"{name}.{end}" for end in ("pem", "key", "csr"))
        extension = self.folder / "extension"
        extension.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        openssl("req", *_KEY, "-keyout", str(key), "-out", str(request), "-subj", f"/CN={name}")
        signed = ["-CA", str(self.pem), "-CAkey", str(self.folder / "ca.key"), "-CAcreateserial"]
        openssl("x509", "-req", "-in", str(request), *signed, "-out", str(cert), "-extfile", str(extension))
        return cert, key


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    openssl("req", "-x509", *_KEY, "-keyout", str(made.folder / "ca.key"), "-out", str(made.pem), "-subj", "/CN=ca")
    return made


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> tuple[Path, Path]:
    """Certificate and key that the server is given; a test may put others in their place."""
    return authority.issue("server")


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    """What a client with a certificate of its own trusts."""
    made = ssl.create_default_context(cafile=str(authority.pem))
    made.load_cert_chain(*authority.issue("client"))
    return made


@pytest.fixture(scope="module")
def mutual(
    authority: Authority, certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that asks its clients for certificates, with gRPC beside it."""
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris", models / "iris")
    cert, key = map(str, certificate)
    flags = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", str(authority.pem), "--grpc-port", "0")
    with running(*flags, models=models) as server:
        yield server


def url(server: Server) -> str:
    return f"https://127.0.0.1:{server.port}"


def connected(server: Server, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", server.port), 10)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def grpc_address(server: Server) -> str:
    found = re.search(r"gRPC: (127\.0\.0\.1:\d+)", server.output())
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def truth() -> list[list[float]]:
    """What onnxruntime itself says of each row, asked alone."""
    session = onnxruntime.InferenceSession(MODELS / "iris" / "2" / "model.onnx")
    return [session.run(["probabilities"], {"features": row[None]})[0][0].tolist() for row in ROWS]


def infer(client: httpx.Client, row: np.ndarray[tuple[int], np.dtype[np.float32]]) -> list[float]:
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": row.tolist()}
    answer = client.post(_PREDICT, json={"inputs": [tensor], "outputs": [{"name": "probabilities"}]})
    assert answer.status_code == 200, answer.text
    data: list[float] = answer.json()["outputs"][0]["data"]
    return data


def test_requests_alone_are_answered_right(mutual: Server, context: ssl.SSLContext, truth: list[list[float]]) -> None:
    """One request at a time, which model threads answer themselves where they may, comes back encrypted and right."""
    with httpx.Client(base_url=url(mutual), verify=context) as client:
        for _ in range(3):
            for row, expected in zip(ROWS, truth, strict=True):
                assert infer(client, row) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_tritonclient_speaks_tls(
    kind: str, mutual: Server, authority: Authority, context: ssl.SSLContext, truth: list[list[float]]
) -> None:
    """Triton's clients ask over mutual TLS; theirs for gRPC accepts none but a server that says h2."""
    module = triton_http if kind == "http" else triton_grpc
    if kind == "http":
        asked = triton_http.InferenceServerClient(
            f"127.0.0.1:{mutual.port}", ssl=True, ssl_context_factory=lambda: context
        )
    else:
        cert, key = (str(authority.folder / f"client.{end}") for end in ("pem", "key"))
        asked = triton_grpc.InferenceServerClient(
            grpc_address(mutual),
            ssl=True,
            root_certificates=str(authority.pem),
            private_key=key,
            certificate_chain=cert,
        )
    with asked:
        for row, expected in zip(ROWS, truth, strict=True):
            tensor = module.InferInput("features", [1, 4], "FP32")
            tensor.set_data_from_numpy(row[None])
            answer = asked.infer("iris", [tensor]).as_numpy("probabilities")
            assert answer[0].tolist() == pytest.approx(expected)


def test_a_client_without_a_certificate_learns_nothing(mutual: Server, authority: Authority) -> None:
    """Mutual TLS lets nobody in whose certificate is not signed by the authority, over HTTP and gRPC."""
    stranger = ssl.create_default_context(cafile=str(authority.pem))
    with pytest.raises(httpx.TransportError), httpx.Client(verify=stranger) as client:
        client.get(url(mutual) + "/v2/health/ready")
    credentials = grpc.ssl_channel_credentials(authority.pem.read_bytes())
    with (
        triton_grpc.InferenceServerClient(grpc_address(mutual), creds=credentials) as asked,
        pytest.raises(triton_grpc.InferenceServerException),
    ):
        asked.is_server_live(client_timeout=5)


def test_plain_http_gets_no_answer(mutual: Server) -> None:
    """Who speaks plain HTTP to a TLS port is cut off, and the server goes on."""
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{mutual.port}/v2/health/ready", timeout=10)
    assert mutual.process.poll() is None


def test_a_request_that_is_no_http_is_told_so(mutual: Server, context: ssl.SSLContext) -> None:
    """A refusal arrives over TLS too, and the connection ends behind it."""
    with connected(mutual, context) as encrypted:
        encrypted.sendall(b"this is no request\r\n\r\n")
        answer = b"".join(iter(lambda: encrypted.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in answer


def test_sighup_reads_certificates_anew(
    mutual: Server,
    authority: Authority,
    certificate: tuple[Path, Path],
    context: ssl.SSLContext,
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    """A bad certificate changes nothing; a good one is shown after SIGHUP; no request fails meanwhile."""

    def shown() -> bytes:
        with connected(mutual, context) as encrypted:
            return encrypted.getpeercert(binary_form=True) or b""

    failures: list[object] = []
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url(mutual), verify=context, timeout=30) as client:
            while not over.is_set():
                try:
                    infer(client, ROWS[0])
                except (AssertionError, httpx.HTTPError) as error:
                    failures.append(error)

    before = shown()
    whole = certificate[0].read_bytes()
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        certificate[0].write_text("no certificate")
        mutual.process.send_signal(signal.SIGHUP)
        eventually(lambda: "the configuration is not read again, the old one stays" in mutual.output())
        assert shown() == before
        certificate[0].write_bytes(whole)
        fresh = authority.issue("fresh")
        for old, new in zip(certificate, fresh, strict=True):
            new.replace(old)
        mutual.process.send_signal(signal.SIGHUP)
        eventually(lambda: "every worker is new" in mutual.output())
        assert shown() != before
    finally:
        over.set()
        asking.join()
    assert not failures


@pytest.mark.parametrize(
    ("cert", "key", "ca", "said"),
    [
        (None, "server.key", None, "say nothing without --tls-cert"),
        ("gone.pem", "server.key", None, "can't be read: No such file"),
        ("ca.pem", "server.key", None, "fits together"),
        ("extension", None, None, "fits together"),
        ("server.pem", "server.key", "extension", "holds no certificate"),
        ("server.pem", "locked.key", None, "encrypted: decrypt it"),
    ],
)
def test_what_is_wrong_with_certificates_is_said(
    cert: str | None, key: str | None, ca: str | None, said: str, authority: Authority
) -> None:
    """A server that can't use its certificates says which file is wrong, and never asks on a terminal."""
    authority.issue("server")
    openssl(
        "pkey", "-in", str(authority.folder / "server.key"), "-aes256", "-passout", "pass:secret",
        "-out", str(authority.folder / "locked.key"),
    )  # fmt: skip
    paths = [None if name is None else authority.folder / name for name in (cert, key, ca)]
    with pytest.raises(TlsInvalid, match=said):
        server_context(*paths, "http/1.1")
