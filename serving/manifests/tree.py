"""What Kubernetes is given, as files: a kustomize base with components and overlays, a Helm chart, KServe's runtime.

Base and chart are one text each: where clusters differ, it names a value of `chart/values.yaml`. In the base that value
stands in its place, in the chart's template an expression that looks it up.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from textwrap import indent

_SWITCHES = {
    "keda": 'eq .Values.autoscaling "keda"',
    "prometheus-adapter": 'eq .Values.autoscaling "prometheus-adapter"',
    "monitoring": ".Values.monitoring",
    "network-policy": ".Values.networkPolicy",
}
"""When the chart has what a component adds."""


def tree() -> dict[str, str]:
    """Return the text of each file by its path below the folder that they are written to."""
    package = Path(str(files("serving.manifests")))
    sources = {str(path.relative_to(package)): path.read_text() for path in sorted(package.rglob("*.yaml"))}
    rules = files("serving.dashboards").joinpath("rules.yml").read_text()
    release = {"version": version("serving")}
    given = re.findall(r"^(\w+):\s+(.+(?:\n  .+)*)$", _filled(sources["chart/values.yaml"], release), re.MULTILINE)
    values = {name: text.replace("\n", "\n" + 6 * " ") for name, text in given}
    base = values | release | {"name": "serving", "namespace": "serving", "rules": indent(rules, "  ")}
    base |= {"pod": "", "env": ""}  # of which kustomize makes patches
    chart = {name: f"{{{{ toJson .Values.{name} }}}}" for name in values} | {
        "name": "{{ .Release.Name }}",
        "namespace": "{{ .Release.Namespace }}",
        "replicas": '{{ if eq .Values.autoscaling "none" }}{{ .Values.replicas }}{{ end }}',
        "pod": "{{- with .Values.pod }}{{ toYaml . | nindent 6 }}{{ end }}",
        "env": "{{- with .Values.env }}{{ toYaml . | nindent 12 }}{{ end }}",
        "rules": '{{ .Files.Get "rules.yml" | indent 2 }}',  # its own expressions are Prometheus' to fill
    }
    made = {path: re.sub(r"^ +\n", "", _filled(text, base), flags=re.MULTILINE) for path, text in sources.items()}
    for path, text in sources.items():
        folder, _, name = path.rpartition("/")
        if folder.startswith(("base", "components/")) and _is_object(text):
            template = _filled(text, chart)
            switch = _SWITCHES.get(folder.removeprefix("components/"))
            made[f"chart/templates/{name}"] = (
                f"{{{{- if {switch} }}}}\n{template}{{{{- end }}}}\n" if switch else template
            )
    schema = "chart/values.schema.json"
    return made | {"chart/rules.yml": rules, schema: (package / schema).read_text()}


def _filled(text: str, values: dict[str, str]) -> str:
    return Template(text).substitute(values)


def _is_object(text: str) -> bool:
    """Tell what the cluster is given from what is for kustomize, or for another chart."""
    kind = re.search(r"^kind: (\w+)", text, re.MULTILINE)
    return kind is not None and kind[1] not in ("Component", "Kustomization")
