"""REST: health, metadata, JSON tensors, and what Triton adds beside predictions."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.conformance.point import point
from tests.conformance.subject import NotAsked, Subject, flat, read, same

META = "REST: health and metadata"
JSON = "REST: JSON tensors"
EXTRA = "REST: extensions"


def _status(answer: Any, *due: int) -> Any:
    assert answer.status_code in due, f"{answer.status_code}: {answer.text[:160]}"
    return answer


@point(META, "GET /v2/health/live and /ready are 200")
def _(subject: Subject) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        _status(subject.client.get(path), 200)


@point(META, "GET /v2 has name, version, extensions")
def _(subject: Subject) -> None:
    body = _status(subject.client.get("/v2"), 200).json()
    assert isinstance(body["name"], str)
    assert isinstance(body["version"], str)
    assert isinstance(body["extensions"], list)


@point(META, "every extension that is listed answers")
def _(subject: Subject) -> None:
    extensions = subject.client.get("/v2").json()["extensions"]
    model = subject.model()
    paths = {
        "statistics": ("GET", f"/v2/models/{model.name}/stats"),
        "model_configuration": ("GET", f"/v2/models/{model.name}/config"),
        "model_repository": ("POST", "/v2/repository/index"),
        "system_shared_memory": ("GET", "/v2/systemsharedmemory/status"),
        "cuda_shared_memory": ("GET", "/v2/cudasharedmemory/status"),
        "trace": ("GET", "/v2/trace/setting"),
        "logging": ("GET", "/v2/logging"),
    }
    if not extensions:
        raise NotAsked("it lists none")
    for name in extensions:
        if name in paths:
            _status(subject.client.request(*paths[name]), 200)


@point(META, "GET /v2/models/M has name, versions, platform, inputs, outputs")
def _(subject: Subject) -> None:
    body = subject.client.get(f"/v2/models/{subject.model().name}").json()
    assert {"name", "platform", "inputs", "outputs"} <= body.keys(), f"has {sorted(body)}"
    for tensor in body["inputs"] + body["outputs"]:
        assert {"name", "datatype", "shape"} <= tensor.keys(), f"a tensor has {sorted(tensor)}"


@point(META, "GET /v2/models/M/ready is 200")
def _(subject: Subject) -> None:
    _status(subject.client.get(f"/v2/models/{subject.model().name}/ready"), 200)


@point(META, "a version can be asked for, described and found ready")
def _(subject: Subject) -> None:
    model = subject.model()
    if not model.versions:
        raise NotAsked("the model has no versions")
    for version in model.versions:
        path = f"/v2/models/{model.name}/versions/{version}"
        _status(subject.client.get(path), 200)
        _status(subject.client.get(f"{path}/ready"), 200)
        answer = read(subject.post(f"{path}/infer", model.json()))
        assert answer["model_version"] == version, f"version {version} is answered by {answer.get('model_version')}"


@point(META, "an unknown model is 404: metadata, ready, infer")
def _(subject: Subject) -> None:
    for path in ("/v2/models/no-such-model", "/v2/models/no-such-model/ready"):
        _status(subject.client.get(path), 404)
    _status(subject.post("/v2/models/no-such-model/infer", subject.model().json()), 404)


@point(META, "an unknown version is 404: metadata, ready, infer")
def _(subject: Subject) -> None:
    model = subject.model()
    path = f"/v2/models/{model.name}/versions/987654"
    _status(subject.client.get(path), 404)
    _status(subject.client.get(f"{path}/ready"), 404)
    _status(subject.post(f"{path}/infer", model.json()), 404)


@point(META, "errors are JSON with `error`, a string")
def _(subject: Subject) -> None:
    answers = [
        subject.client.get("/v2/models/no-such-model"),
        subject.post("/v2/models/no-such-model/infer", {}),
        subject.post(subject.model().path, b"{"),
    ]
    for answer in answers:
        assert answer.status_code >= 400, f"a bad request is {answer.status_code}"
        assert isinstance(answer.json()["error"], str), answer.text[:100]


@point(JSON, "a request is answered with model_name and all outputs as declared")
def _(subject: Subject) -> None:
    for model in subject.models:
        if {"FP16", "BF16"}.intersection(t.datatype for t in model.inputs):
            continue
        answer = subject.infer(model, model.json())
        assert answer["model_name"] == model.name, f"model_name is {answer['model_name']}"
        declared = {t.name: t for t in model.outputs}
        assert {o["name"] for o in answer["outputs"]} == set(declared), (
            f"outputs {[o['name'] for o in answer['outputs']]}"
        )
        for output in answer["outputs"]:
            due = declared[output["name"]]
            assert output["datatype"] == due.datatype, f"{due.name} is {output['datatype']}"
            assert len(output["shape"]) == len(due.shape), f"{due.name} has shape {output['shape']}"
            assert all(d in (-1, g) for d, g in zip(due.shape, output["shape"], strict=True)), (
                f"{due.name} {output['shape']}"
            )
            size = 1
            for dim in output["shape"]:
                size *= dim
            assert len(flat(output["data"])) == size, f"{due.name} has {len(flat(output['data']))} elements"


@point(JSON, "nested data is the same as flat data")
def _(subject: Subject) -> None:
    model = subject.model()
    document = model.json()
    nested = model.json()
    for tensor, array in zip(nested["inputs"], model.arrays(), strict=True):
        tensor["data"] = array.tolist()
    same(subject.infer(model, document), subject.infer(model, nested))


@point(JSON, "several rows are answered in their order")
def _(subject: Subject) -> None:
    model = subject.model(batched=True)
    many = subject.infer(model, model.json(3))
    last: dict[str, Any] = {"inputs": []}
    for tensor, array in zip(model.inputs, model.arrays(3), strict=True):
        one = array[2:]
        last["inputs"].append(
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(one.shape), "data": one.ravel().tolist()}
        )
    alone = subject.infer(model, last)
    for output in many["outputs"]:
        size = len(flat(output["data"])) // 3
        output["data"] = flat(output["data"])[-size:]
        output["shape"] = [1, *output["shape"][1:]]
    same(alone, many)


@point(JSON, "a body without a Content-Type is JSON too, as tritonclient sends it")
def _(subject: Subject) -> None:
    model = subject.model()
    body = json.dumps(model.json()).encode()
    same(read(subject.client.post(model.path, content=body)), subject.infer(model, model.json()))


@point(JSON, "id comes back, and only if it was sent")
def _(subject: Subject) -> None:
    model = subject.model()
    assert subject.infer(model, model.json(id="a-1"))["id"] == "a-1"
    assert not subject.infer(model, model.json()).get("id"), "an id was made up"


@point(JSON, "unknown parameters do no harm: of the request, an input, an output")
def _(subject: Subject) -> None:
    model = subject.model()
    outputs = [{"name": model.outputs[0].name, "parameters": {"mine": "x"}}]
    document = model.json(parameters={"mine": 1, "yours": True}, outputs=outputs)
    document["inputs"][0]["parameters"] = {"mine": 1.5}
    subject.infer(model, document)


@point(JSON, "outputs are those that are listed, in that order")
def _(subject: Subject) -> None:
    model = next(
        (m for m in subject.models if len(m.outputs) > 1 and "BF16" not in {t.datatype for t in m.inputs}), None
    )
    if model is None:
        raise NotAsked("no model has two outputs")
    names = [t.name for t in reversed(model.outputs)]
    answer = subject.infer(model, model.json(outputs=[{"name": name} for name in names]))
    assert [o["name"] for o in answer["outputs"]] == names
    answer = subject.infer(model, model.json(outputs=[{"name": names[0]}]))
    assert [o["name"] for o in answer["outputs"]] == names[:1]


@point(JSON, "every datatype: BOOL, all ints, FP32, FP64, BYTES")
def _(subject: Subject) -> None:
    model = subject.named("probe_types")
    document = model.json(2)
    answer = subject.infer(model, document)
    due = [{**t, "name": t["name"].replace("in_", "out_")} for t in document["inputs"]]
    same(answer, {"outputs": due})


@point(JSON, "the greatest and the least of every integer type go through")
def _(subject: Subject) -> None:
    model = subject.named("probe_types")
    document = model.json()
    for tensor in document["inputs"]:
        if "INT" in tensor["datatype"]:
            bits = int(tensor["datatype"].split("INT")[1])
            signed = not tensor["datatype"].startswith("U")
            tensor["data"] = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1]
    due = [{**t, "name": t["name"].replace("in_", "out_")} for t in document["inputs"]]
    same(subject.infer(model, document), {"outputs": due})


@point(JSON, "NaN in an output: the answer is JSON that a strict parser reads, or a 4xx")
def _(subject: Subject) -> None:
    model = subject.named("probe_ratio")
    document = model.json()
    for tensor in document["inputs"]:
        tensor["data"] = [0.0]
    answer = _status(subject.post(model.path, document), 200, 400, 422)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    json.loads(answer.content, parse_constant=refuse)


@point(JSON, "an output without elements is `[]`")
def _(subject: Subject) -> None:
    model = subject.named("probe_empty")
    document = model.json()
    document["inputs"][0]["data"] = [0, 0, 0, 0]
    (output,) = subject.infer(model, document)["outputs"]
    assert output["shape"] == [1, 0], f"its shape is {output['shape']}"
    assert output["data"] == []


@point(EXTRA, "classification: value:index, best first, k of them")
def _(subject: Subject) -> None:
    for model in subject.models:
        for output in model.outputs:
            if output.datatype in ("FP32", "FP64") and len(output.shape) == 2 and output.shape[1] != 1:
                asked = [{"name": output.name, "parameters": {"classification": 2}}]
                (found,) = subject.infer(model, model.json(outputs=asked))["outputs"]
                assert found["datatype"] == "BYTES", f"it is {found['datatype']}"
                assert found["shape"] == [1, 2], f"its shape is {found['shape']}"
                first, second = (float(text.split(":")[0]) for text in flat(found["data"]))
                assert first >= second, "the best is not first"
                int(flat(found["data"])[0].split(":")[1])
                return
    raise NotAsked("no model has scores")


@point(EXTRA, "statistics count what was answered: of a model, a version, all")
def _(subject: Subject) -> None:
    model = subject.model()

    def count() -> int:
        stats = _status(subject.client.get(f"/v2/models/{model.name}/stats"), 200).json()["model_stats"]
        return sum(int(one["inference_count"]) for one in stats)

    before = count()
    subject.infer(model, model.json())
    until = time.monotonic() + 5
    while count() < before + 1:
        assert time.monotonic() < until, "inference_count did not grow"
        time.sleep(0.05)
    assert _status(subject.client.get("/v2/models/stats"), 200).json()["model_stats"]
    for version in model.versions:
        path = f"/v2/models/{model.name}/versions/{version}/stats"
        (only,) = _status(subject.client.get(path), 200).json()["model_stats"]
        assert {"success", "fail", "queue", "compute_infer"} <= only["inference_stats"].keys()


@point(EXTRA, "configuration: name, platform or backend, max_batch_size, input, output")
def _(subject: Subject) -> None:
    model = subject.model()
    config = _status(subject.client.get(f"/v2/models/{model.name}/config"), 200).json()
    assert {"name", "max_batch_size", "input", "output"} <= config.keys(), f"has {sorted(config)}"
    assert [i["name"] for i in config["input"]] == [t.name for t in model.inputs]
    assert all(i["data_type"].startswith("TYPE_") for i in config["input"])


@point(EXTRA, "repository index: a bare array of name, version, state, reason; the body may be empty")
def _(subject: Subject) -> None:
    for document in (None, {}):
        index = _status(subject.post("/v2/repository/index", document), 200).json()
        assert isinstance(index, list), "it is no array"
        assert all({"name", "state"} <= one.keys() for one in index)
        assert subject.model().name in {one["name"] for one in index}


@point(EXTRA, "repository index: `ready` leaves out what can't answer")
def _(subject: Subject) -> None:
    index = _status(subject.post("/v2/repository/index", {"ready": True}), 200).json()
    assert index
    assert all(one.get("state") == "READY" for one in index), "it lists others too"


@point(EXTRA, "unload stops a model and load brings it back", last=True)
def _(subject: Subject) -> None:
    model = subject.models[-1]
    path = f"/v2/repository/models/{model.name}"
    answer = subject.post(f"{path}/unload", {})
    if answer.status_code in (401, 403):
        raise NotAsked(f"{answer.status_code}: it wants a --key")
    _status(answer, 200)
    try:
        until = time.monotonic() + 10
        while subject.client.get(f"/v2/models/{model.name}/ready").status_code == 200:
            assert time.monotonic() < until, "it is still ready"
            time.sleep(0.05)
        _status(subject.post(model.path, model.json()), 400, 404, 503)
        index = subject.post("/v2/repository/index", {"ready": True}).json()
        assert model.name not in {one["name"] for one in index}, "the index still says READY"
    finally:
        _status(subject.post(f"{path}/load", {}), 200)
    until = time.monotonic() + 10
    while subject.client.get(f"/v2/models/{model.name}/ready").status_code != 200:
        assert time.monotonic() < until, "it does not come back"
        time.sleep(0.05)


@point(EXTRA, "load of an unknown model is a 4xx")
def _(subject: Subject) -> None:
    answer = subject.post("/v2/repository/models/no-such-model/load", {})
    if answer.status_code in (401, 403):
        raise NotAsked(f"{answer.status_code}: it wants a --key")
    assert 400 <= answer.status_code < 500, f"{answer.status_code}: {answer.text[:100]}"


@point(EXTRA, "timeout: who waits longer is told so (429, 499, 503, 504)")
def _(subject: Subject) -> None:
    slow = subject.named("probe_slow")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        document = slow.json()
        document["inputs"][0]["data"] = [_turns(subject)]
        first = pool.submit(subject.post, slow.path, document)
        time.sleep(0.1)
        began = time.monotonic()
        late = subject.post(slow.path, {**document, "parameters": {"timeout": 50_000}})
        waited = time.monotonic() - began
        _status(first.result(), 200)
    _status(late, 429, 499, 503, 504)
    assert waited < 0.6, f"it was told after {waited:.1f} s"


def _turns(subject: Subject) -> int:
    """Return how many turns of the slow probe take about a second."""
    slow = subject.named("probe_slow")
    document = slow.json()
    document["inputs"][0]["data"] = [20]
    subject.infer(slow, document)
    began = time.monotonic()
    subject.infer(slow, document)
    return max(20, int(20 / max(0.001, time.monotonic() - began)))


@point(EXTRA, "shared memory that clients choose is not offered (its doors answer 4xx)")
def _(subject: Subject) -> None:
    for kind in ("systemsharedmemory", "cudasharedmemory"):
        answer = subject.client.get(f"/v2/{kind}/status")
        assert 400 <= answer.status_code < 500, f"/v2/{kind}/status answers {answer.status_code}"
