"""What `serving manifests export` writes: Kubernetes takes it, both forms say the same, and this server does so."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import kubernetes_validate
import pytest
import tritonclient.grpc as triton
import yaml
from jsonschema import Draft7Validator
from typer.testing import CliRunner

from serving.command_line import app
from serving.metrics.definitions import GAUGES
from serving.settings import Settings
from tests.conformance.own import grpc_address
from tests.conftest import MODELS, ROOT, Server
from tests.manifests.chart import TREE, objects, rendered

OBJECTS = {
    f"{path}: {one['kind']}": one
    for path, text in TREE.items()
    if not path.startswith("chart/")
    for one in objects(path, text)
}
BASE = {path: one for path, one in OBJECTS.items() if path.startswith("base/")}
OLDEST, NEWEST = "1.30", "1.36"
CRDS = {
    (crd["apiVersion"], crd["kind"]): crd["schema"]
    for crd in (json.loads(file.read_text()) for file in (Path(__file__).parent / "crds").glob("*.json"))
}
"""Of what is not Kubernetes' own, each with its source; texts, and deep parts that nobody here uses, are left out."""
KUBECTL = shutil.which("kubectl")

POD = OBJECTS["base/deployment.yaml: Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
RUNTIME = OBJECTS["kserve/runtime.yaml: ClusterServingRuntime"]["spec"]
SERVICE = OBJECTS["kserve/inference-service.yaml: InferenceService"]


def strict(schema: Any) -> Any:
    """Refuse fields that a schema does not have, which the API server would drop."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(one) for name, one in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def wrong(one: dict[str, Any]) -> list[str]:
    """Say what the API server would not take."""
    schema = CRDS.get((one["apiVersion"], one["kind"]))
    if schema is not None:
        closed = strict(schema)
        closed["properties"]["metadata"] = {"type": "object"}
        return [error.message for error in Draft7Validator(closed).iter_errors(one)]
    found = []
    for version in (OLDEST, NEWEST):
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(error.message)
    return found


@pytest.mark.parametrize("where", OBJECTS)
def test_every_object_fits_its_schema(where: str) -> None:
    """The API server of the oldest and of a new Kubernetes, and each operator's, knows every field and its type."""
    assert wrong(OBJECTS[where]) == []


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ("base/deployment.yaml: Deployment", "replica"),
        ("components/keda/scaled-object.yaml: ScaledObject", "trigger"),
        ("kserve/runtime.yaml: ClusterServingRuntime", "protocolVersion"),
    ],
)
def test_a_misspelt_field_does_not(where: str, field: str) -> None:
    """The check of schemas finds what it is there for."""
    one = json.loads(json.dumps(OBJECTS[where]))
    one["spec"][field] = 1
    assert wrong(one) != []


@pytest.mark.parametrize("scaled", ["none", "prometheus-adapter", "keda"])
def test_the_chart_says_what_kustomize_says(scaled: str) -> None:
    """A release called `serving` with all that there is has the objects of base and components, to the last field."""
    given = {"autoscaling": scaled, "monitoring": True, "networkPolicy": True}
    due = [
        one
        for path, one in OBJECTS.items()
        if path.startswith(("base/", "components/monitoring/", "components/network-policy/", f"components/{scaled}/"))
    ]
    made = rendered(given)
    if scaled != "none":
        (deployment,) = (one for one in made if one["kind"] == "Deployment")
        assert deployment["spec"]["replicas"] is None, "an autoscaler's number would be set back by each upgrade"
        deployment["spec"]["replicas"] = 2
    by_kind = lambda one: str(one["kind"])  # noqa: E731
    assert sorted(made, key=by_kind) == sorted(due, key=by_kind)
    assert sorted(map(by_kind, rendered({}))) == sorted(map(by_kind, BASE.values()))


def test_a_release_can_have_more() -> None:
    """What a cluster wants of pods beside all this, such as an account with rights on a bucket, has its place."""
    given = {"pod": {"serviceAccountName": "models"}, "env": [{"name": "AWS_REGION", "value": "eu-central-1"}]}
    (deployment,) = (one for one in rendered(given) if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "models"
    assert pod["containers"][0]["env"] == [*CONTAINER["env"], *given["env"]]
    assert wrong(deployment) == []


def test_values_that_are_none_are_refused_by_name() -> None:
    """What Helm checks before anything is made: each value of the chart is known there, and has its type."""
    values, schema = yaml.safe_load(TREE["chart/values.yaml"]), json.loads(TREE["chart/values.schema.json"])
    assert set(schema["required"]) == values.keys() == schema["properties"].keys() - {"global"}
    check = Draft7Validator(schema)
    assert check.is_valid(values)
    wrong = {
        "autoscaling": "KEDA",
        "monitoring": "false",
        "queuedRows": "64",
        "args": "run",
        "image": "",
        "imagee": "x",
    }
    for name, value in wrong.items():
        assert any(name in f"{error.json_path} {error.message}" for error in check.iter_errors(values | {name: value}))
    spec = yaml.safe_load(TREE["base/deployment.yaml"])["spec"]["template"]["spec"]
    assert not any(check.is_valid(values | {"pod": {name: {}}}) for name in spec), "a key stands there twice"
    assert not check.is_valid({name: values[name] for name in values if name != "volumes"})


def test_a_release_whose_name_reads_as_something_else() -> None:
    """YAML takes on, 123 and the like for no text: names are in quotation marks."""
    for one in rendered({"autoscaling": "keda", "monitoring": True, "networkPolicy": True}, "123", "456"):
        assert one["metadata"]["name"] == "123"
        assert one["metadata"].get("labels", {}).get("app.kubernetes.io/instance", "123") == "123"


def test_two_releases_do_not_meet() -> None:
    """Names, and by what pods are chosen, follow the release."""
    made = rendered({"autoscaling": "keda", "monitoring": True, "networkPolicy": True}, "other", "elsewhere")
    assert {one["metadata"]["name"] for one in made} == {"other"}
    for labels in re.findall(r'"matchLabels": \{"app[^}]*\}', json.dumps(made)):
        assert '"app.kubernetes.io/instance": "other"' in labels
    (scaled,) = (one["spec"] for one in made if one["kind"] == "ScaledObject")
    assert '{namespace="elsewhere",service="other"}' in scaled["triggers"][0]["metadata"]["query"]


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed; schemas and chart are tested without it")
@pytest.mark.parametrize(
    ("folders", "kinds"),
    [
        (("base",), set()),
        (("overlays/keda",), {"ScaledObject", "NetworkPolicy", "ServiceMonitor", "PrometheusRule"}),
        (
            ("overlays/prometheus-adapter",),
            {"HorizontalPodAutoscaler", "NetworkPolicy", "ServiceMonitor", "PrometheusRule"},
        ),
        (("base", "components/shared-state"), set()),
    ],
)
def test_kustomize_builds(folders: tuple[str, ...], kinds: set[str], tmp_path: Path) -> None:
    """Every overlay, and the base with each component, is built, and each object of it fits its schema."""
    done = CliRunner().invoke(app, ["manifests", "export", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(tmp_path / path) for path in TREE]
    if len(folders) > 1:
        (tmp_path / "both").mkdir()
        both = {"resources": [f"../{folders[0]}"], "components": [f"../{folders[1]}"]}
        (tmp_path / "both" / "kustomization.yaml").write_text(yaml.safe_dump(both))
    folder = tmp_path / ("both" if len(folders) > 1 else folders[0])
    assert KUBECTL is not None
    built = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    made = list(yaml.safe_load_all(built.stdout))
    assert {one["kind"] for one in made} == {"Deployment", "PodDisruptionBudget", "Service"} | kinds
    assert {one["metadata"]["namespace"] for one in made} == {"serving"}
    assert [problem for one in made for problem in wrong(one)] == []
    (deployment,) = (one for one in made if one["kind"] == "Deployment")
    assert ("replicas" in deployment["spec"]) == (folders[0] == "base")
    if "components/shared-state" in folders:
        models, state, _ = deployment["spec"]["template"]["spec"]["volumes"]
        assert not models["persistentVolumeClaim"]["readOnly"]
        assert "emptyDir" not in state


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
def test_another_namespace_and_other_names_are_followed_everywhere(tmp_path: Path) -> None:
    """What scales asks of the pods of its own namespace, by their Service's name, and is of their Deployment."""
    CliRunner().invoke(app, ["manifests", "export", str(tmp_path)])
    chosen = tmp_path / "overlays" / "keda" / "kustomization.yaml"
    chosen.write_text(chosen.read_text().replace("namespace: serving\n", "namespace: team\nnamePrefix: our-\n"))
    assert KUBECTL is not None
    built = subprocess.run([KUBECTL, "kustomize", str(chosen.parent)], capture_output=True, text=True, check=True)
    (scaled,) = (one["spec"] for one in yaml.safe_load_all(built.stdout) if one["kind"] == "ScaledObject")
    assert scaled["scaleTargetRef"]["name"] == "our-serving"
    assert '{namespace="team",service="our-serving"}' in scaled["triggers"][0]["metadata"]["query"]


def flags(args: list[str]) -> dict[str, str]:
    """Return the settings that a container's arguments stand for."""
    assert args[0] == "run"
    return {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(args[1::2], args[2::2], strict=True)
    }


@pytest.fixture(scope="module")
def kserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What KServe starts for the InferenceService, with the file that its storage has."""
    folder = tmp_path_factory.mktemp("mnt")
    shutil.copy(MODELS / "iris" / "2" / "model.onnx", folder)
    places = {"/mnt/models": str(folder), "{{.Name}}": SERVICE["metadata"]["name"], "9000": "0"}
    command = [places.get(argument, argument) for argument in RUNTIME["containers"][0]["args"]]
    server = Server("--port", "0", command=command)
    try:
        yield server.wait()
    finally:
        server.stop()


def test_an_inference_service(kserve: Server) -> None:
    """KServe's pod answers all three protocols under the name of the InferenceService."""
    name, model = SERVICE["metadata"]["name"], SERVICE["spec"]["predictor"]["model"]
    with httpx.Client(base_url=kserve.url) as client:
        answer = client.post(f"/v1/models/{name}:predict", json={"instances": [[5.1, 3.5, 1.4, 0.2]]})
        assert answer.json()["predictions"][0]["label"] == "setosa"
        assert client.get(f"/v2/models/{name}/ready").status_code == 200
    with triton.InferenceServerClient(grpc_address(kserve)) as grpc:
        assert grpc.is_model_ready(name)
    formats = {one["name"]: one for one in RUNTIME["supportedModelFormats"]}
    assert formats[model["modelFormat"]["name"]]["autoSelect"]
    assert model["protocolVersion"] in RUNTIME["protocolVersions"]


def test_the_server_does_what_is_asked_of_it(kserve: Server, tmp_path: Path) -> None:
    """Flags and variables are settings, ports and paths are served, and metrics that are asked for are counted."""
    settings = Settings(models=tmp_path, **flags(CONTAINER["args"]))
    assert {entry["name"] for entry in CONTAINER["env"]} <= {
        f"SERVING_{name.upper()}" for name in Settings.model_fields
    }
    assert [port["containerPort"] for port in CONTAINER["ports"]] == [settings.port, settings.grpc_port]
    probes = [one[name] for one in (CONTAINER, *RUNTIME["containers"]) for name in one if name.endswith("Probe")]
    (monitor,) = OBJECTS["components/monitoring/service-monitor.yaml: ServiceMonitor"]["spec"]["endpoints"]
    paths = [probe["httpGet"]["path"] for probe in probes]
    assert len(paths) == 5
    for path in {*paths, monitor["path"]}:
        assert httpx.get(kserve.url + path).status_code == 200
    asked = "".join(text for path, text in TREE.items() if re.match(r"components/(keda|prometheus-adapter)/", path))
    assert set(re.findall(r"serving_\w+", asked)) <= GAUGES.keys()


def test_times_fit() -> None:
    """A pod is not killed before its drain is over."""
    given = flags(CONTAINER["args"])
    needed = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] + float(given["drain_delay_s"])
    assert POD["terminationGracePeriodSeconds"] >= needed + float(given["drain_s"]) + 5
    # KServe leaves Kubernetes' own 30 s.
    given = flags(RUNTIME["containers"][0]["args"])
    assert float(given["drain_s"]) + 5 <= 30


@pytest.mark.parametrize(
    ("pod", "container"),
    [(POD, CONTAINER), ({}, RUNTIME["containers"][0])],
    ids=["Deployment", "ClusterServingRuntime"],
)
def test_pods_are_confined(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """They keep Kubernetes' standard "restricted", run as the image's user, and write only to volumes."""
    context = pod.get("securityContext", {}) | container["securityContext"]
    image = re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert image is not None
    assert context["runAsUser"] == int(image[1])
    assert context["runAsNonRoot"]
    assert context["readOnlyRootFilesystem"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    """A file in the place of the folder is named, with status 1."""
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["manifests", "export", str(tmp_path / "file")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "file: " in done.stderr
