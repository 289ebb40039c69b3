"""Every dialect's decoder on any bytes: it reads tensors that fit the model, or says no in its own words."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from serving.engine.session import OnnxSession
from serving.engine.signature import Described
from serving.errors import ServingError
from serving.protocols import infer_tensors, open_inference, predict_v1
from serving.protocols.messages import message
from serving.tensors import NUMPY
from tests.conftest import ROOT
from tests.drills import mutants
from tests.drills.direct import Direct, gathered
from tests.drills.drill import Report, drill
from tests.drills.wire import LENGTH

KINDS = ("v1", "v2", "v2 binary", "grpc")
FOUND = 77
"""What atheris exits with when it has found a fault."""


class Input(NamedTuple):
    """Bytes for one decoder; `length` is what says how much of a v2 body is JSON."""

    model: int
    kind: str
    length: int
    body: bytes


class Decoders:
    """The decoders of every model in a folder."""

    def __init__(self, folder: Path) -> None:
        self._models: list[dict[str, Any]] = []
        self._signatures = []
        parse = message("ModelInferRequest").FromString
        for path in sorted(folder.glob("*/1/model.onnx")):
            signature = OnnxSession(path, warm_rows=1).signature
            model = Described(path.parts[-3], "1", signature)
            v2, grpc = open_inference.Codec(model), infer_tensors.Codec(model)
            v1 = predict_v1.Codec(model)
            self._signatures.append(signature)
            self._models.append(
                {
                    "v1": lambda given, v1=v1: v1.decode([], given.body),
                    "v2": lambda given, v2=v2: v2.decode([], given.body),
                    "v2 binary": lambda given, v2=v2: v2.decode([(LENGTH.encode(), b"%d" % given.length)], given.body),
                    "grpc": lambda given, grpc=grpc: grpc.decode(parse(given.body)),
                }
            )

    def __len__(self) -> int:
        return len(self._models)

    def read(self, given: Input) -> bool:
        """Decode, and tell whether it was taken; anything but tensors that fit or a ServingError is raised."""
        place = given.model % len(self)
        if given.kind == "grpc":
            try:
                message("ModelInferRequest").FromString(given.body)
            except Exception:
                return False  # whoever calls the decoder has parsed it
        try:
            decoded = self._models[place][given.kind](given)
        except ServingError as error:
            if not error.message.encode() or str(ROOT) in error.message:  # it must be possible to send it
                raise AssertionError("it says nothing, or too much") from error
            return False
        signature = self._signatures[place]
        assert len(decoded.inputs) == len(signature.inputs)
        for spec, array in zip(signature.inputs, decoded.inputs, strict=True):
            assert array.dtype == NUMPY[spec.datatype], spec
            assert array.ndim == len(spec.shape) or 0 in array.shape, spec
            assert not array.dtype.hasobject or all(isinstance(text, str) for text in array.flat), spec
            rows = array.shape[0] if signature.batch == "dynamic" else decoded.rows
            assert rows == decoded.rows, spec
        return True


def seeds(models: dict[str, Direct], count: int) -> list[Input]:
    """Make inputs that are nearly right, for all decoders."""
    made = []
    listed = [models[name] for name in sorted(models)]
    for number in range(count):
        random = Random(number)
        place = random.randrange(len(listed))
        match KINDS[number % 4]:
            case "v1":
                body = json.dumps({"instances": [_row(listed[place], random) for _ in range(random.randint(1, 2))]})
                made.append(Input(place, "v1", 0, body.encode()))
            case "grpc":
                made.append(Input(place, "grpc", 0, mutants.over_grpc([listed[place]], number)[1]))
            case kind:
                mutant = mutants.over_http([listed[place]], number)
                length = mutant.headers.get(LENGTH, "0").strip()
                made.append(
                    Input(place, kind, int(length) if length.isascii() and length.isdigit() else 0, mutant.body)
                )
    return made


def _row(model: Direct, random: Random) -> Any:
    feeds = mutants.tensors(model, random)
    if model.matrix:
        return next(iter(feeds.values()))[0].tolist()
    names = [feature["name"] for feature in model.features]
    cells = [(array[0] if model.batched else array).tolist() for array in feeds.values()]
    flat = [c[0] if f["shape"] == [] and isinstance(c, list) else c for f, c in zip(model.features, cells, strict=True)]
    return dict(zip(names, flat, strict=True))


@drill(
    "decoders", "any bytes are tensors that fit or a plain no, to every decoder: hypothesis, and atheris for minutes"
)
def run(report: Report, *, examples: int = 20_000, seconds: int = 300) -> None:
    """Fuzz by hypothesis, then by coverage; `seconds` 0 leaves atheris out."""
    with tempfile.TemporaryDirectory() as folder:
        models = gathered(Path(folder))
        decoders = Decoders(Path(folder))
        near = seeds(models, 400)
        taken, faults = _by_hypothesis(decoders, near, examples)
        report.at_least("inputs by hypothesis", taken.total(), examples)
        report.at_least("of them read as tensors", taken[True], examples / 50)
        report.exactly("faults found by hypothesis", len(faults), 0)
        planted = _by_hypothesis(Planted(decoders), near, min(examples, 400))[1]
        report.control("a decoder that fails on some bytes is found out by hypothesis", bool(planted))
        if seconds:
            code, runs = _by_atheris(folder, near, seconds)
            report.at_least("inputs by atheris", runs, 10_000)
            report.exactly("faults found by atheris: its exit status", code, 0)
            report.control("a planted fault is found by atheris", _by_atheris(folder, near, 60, "--plant")[0] == FOUND)
    for text in faults[:5]:
        print(text)


def _by_hypothesis(decoders: Any, near: list[Input], examples: int) -> tuple[Counter[bool], list[str]]:
    taken: Counter[bool] = Counter()
    faults: list[str] = []

    scalar = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(mutants.ODD)
    )
    document = st.recursive(
        scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner)
    )

    @st.composite
    def inputs(draw: st.DrawFn) -> Input:
        given_ = draw(st.sampled_from(near))
        match draw(st.sampled_from(["near", "near", "spliced", "bytes", "rows", "deep"])):
            case "spliced":
                at = draw(st.integers(0, len(given_.body)))
                more = draw(st.sampled_from(mutants.TOKENS) | st.binary(max_size=4))
                return given_._replace(body=given_.body[:at] + more + given_.body[at + draw(st.integers(0, 3)) :])
            case "bytes":
                return given_._replace(body=draw(st.binary(max_size=200)), length=draw(st.integers(0, 200)))
            case "rows":
                body = json.dumps({draw(st.sampled_from(["instances", "inputs"])): draw(document)}).encode()
                return given_._replace(body=body, kind=draw(st.sampled_from(["v1", "v2"])))
            case "deep":
                deep = b"[" * draw(st.integers(1, 3000))
                return given_._replace(body=b'{"instances":' + deep + b"]" * len(deep) + b"}", kind="v1")
        return given_

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs())
    def one(given_: Input) -> None:
        try:
            taken[decoders.read(given_)] += 1
        except Exception as error:
            taken[False] += 1
            faults.append(f"{given_}: {type(error).__name__} {error}")

    with np.errstate(all="ignore"):
        one()
    return taken, faults


class Planted:
    """Decoders with a fault, for the controls."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders

    def read(self, given: Input) -> bool:
        if given.body.count(b"{") == 3:
            raise KeyError("planted")
        return self._decoders.read(given)


def packed(given: Input) -> bytes:
    """Write an input as the bytes that atheris mutates."""
    return bytes([given.model, KINDS.index(given.kind), *(given.length % 65536).to_bytes(2, "little")]) + given.body


def unpacked(data: bytes) -> Input:
    """Read what `packed` wrote; any bytes are an input."""
    head = data[:4].ljust(4, b"\0")
    return Input(head[0], KINDS[head[1] % 4], int.from_bytes(head[2:4], "little"), data[4:])


def _by_atheris(folder: str, near: list[Input], seconds: int, *flags: str) -> tuple[int, int]:
    """Run atheris in a process of its own; return its exit status and how many inputs it tried."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, given_ in enumerate(near):
            (Path(corpus) / str(number)).write_bytes(packed(given_))
        command = [sys.executable, "-m", "tests.drills.by_coverage", folder, *flags, corpus]
        command += [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=4096"]
        command += ["-print_final_stats=1", f"-error_exitcode={FOUND}", f"-artifact_prefix={corpus}/"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, cwd=ROOT, check=False)
    text = done.stdout + done.stderr
    runs = [line.split()[-1] for line in text.splitlines() if line.startswith("stat::number_of_executed_units")]
    if done.returncode and not flags:
        print(text[-4000:])
    return done.returncode, int(runs[0]) if runs else 0
