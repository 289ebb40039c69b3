"""Builds the clients, with the compilers and libraries that Debian's packages bring."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
PROTOS = HERE.parents[2] / "serving" / "protocols" / "protos"
SERVICES = {
    "inference": "grpc_service.proto",
    "health": "grpc/health/v1/health.proto",
    "reflection": "grpc/reflection/v1/reflection.proto",
}

_JARS = ("grpc-*", "netty-*", "protobuf", "guava", "perfmark-api", "opencensus-api", "geronimo-annotation-1.3-spec")

_CARGO = """
[package]
name = "client"
version = "0.0.0"
edition = "2021"

[dependencies]
bytes = "1"
futures-util = "0.3"
http-body = "0.4"
hyper = {version = "0.14", features = ["client", "http2", "stream", "tcp"]}
prost = "0.11"
tokio = {version = "1", features = ["macros", "rt-multi-thread", "time"]}
"""
_CRATES = """
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "{}"
"""


class Missing(Exception):
    """What the system lacks to build a client, and what brings it."""


def go(folder: Path) -> list[str]:
    """Build the one that stands on grpc-go; return its command."""
    libraries = "/usr/share/gocode"
    _need(
        ["go", "protoc", "protoc-gen-go"],
        [f"{libraries}/src/google.golang.org/grpc"],
        "golang-go golang-google-grpc-dev golang-goprotobuf-dev protoc-gen-go-1-3 protobuf-compiler",
    )
    for name, proto in SERVICES.items():
        made = folder / "src" / "served" / name
        made.mkdir(parents=True)
        _run(["protoc", f"-I{(PROTOS / proto).parent}", f"--go_out=plugins=grpc:{made}", Path(proto).name])
    (folder / "src" / "client").mkdir()
    shutil.copy(HERE / "client.go", folder / "src" / "client" / "main.go")
    _run(["go", "build", "-o", str(folder / "client"), "client"], GO111MODULE="off", GOPATH=f"{folder}:{libraries}")
    return [str(folder / "client")]


def java(folder: Path) -> list[str]:
    """Build the one that stands on grpc-java and Netty; return its command."""
    jars = sorted(str(path) for name in _JARS for path in Path("/usr/share/java").glob(f"{name}.jar"))
    _need(
        ["javac", "protoc", "grpc_java_plugin"],
        ["/usr/share/java/grpc-netty.jar", "/usr/share/java/netty-all.jar"],
        "default-jdk-headless libgrpc-java libnetty-java libprotobuf-java libperfmark-java protobuf-compiler "
        "protobuf-compiler-grpc-java-plugin",
    )
    plugin = f"--plugin=protoc-gen-grpc-java={shutil.which('grpc_java_plugin')}"
    _run(["protoc", f"-I{PROTOS}", plugin, f"--java_out={folder}", f"--grpc-java_out={folder}", *SERVICES.values()])
    sources = [str(path) for path in folder.rglob("*.java")]
    _run(["javac", "-nowarn", "-cp", ":".join(jars), "-d", str(folder), *sources, str(HERE / "Client.java")])
    return ["java", "-cp", ":".join([str(folder), *jars]), "Client"]


def rust(folder: Path) -> list[str]:
    """Build the one that stands on hyper and h2; return its command."""
    crates = "/usr/share/cargo/registry"
    _need(["cargo"], [crates], "cargo librust-hyper-dev librust-h2-dev librust-prost-dev librust-tokio-dev")
    for name, text in {"Cargo.toml": _CARGO, ".cargo/config.toml": _CRATES.format(crates)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "src").mkdir()
    shutil.copy(HERE / "client.rs", folder / "src" / "main.rs")
    _run(["cargo", "build", "--offline", "--quiet", "--manifest-path", str(folder / "Cargo.toml")], cwd=folder)
    return [str(folder / "target" / "debug" / "client")]


def _need(programs: list[str], paths: list[str], packages: str) -> None:
    lacking = [name for name in programs if shutil.which(name) is None] + [p for p in paths if not Path(p).exists()]
    if lacking:
        raise Missing(f"{', '.join(lacking)} is missing: apt-get install {packages}")


def _run(command: list[str], cwd: Path | None = None, **environment: str) -> None:
    subprocess.run(command, check=True, cwd=cwd, env=os.environ | environment)


LANGUAGES: dict[str, Callable[[Path], list[str]]] = {"go": go, "java": java, "rust": rust}
