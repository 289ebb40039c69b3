"""The chart without Helm: its templates use only what is filled in here, and a drill holds this to Helm itself."""

from __future__ import annotations

import json
import re
from textwrap import indent
from typing import Any

import yaml

from serving.manifests.tree import tree

TREE = tree()


def objects(path: str, text: str) -> list[dict[str, Any]]:
    """Return the objects of a file that are for the cluster."""
    found = [one for one in yaml.safe_load_all(text) if one and path.endswith(".yaml")]
    return [one for one in found if one.get("kind") not in (None, "Component", "Kustomization")]


def rendered(given: dict[str, Any], release: str = "serving", namespace: str = "serving") -> list[dict[str, Any]]:
    """Return the objects that a release is made of. given: values other than those in values.yaml."""
    values = yaml.safe_load(TREE["chart/values.yaml"]) | given
    made = []
    for path, text in TREE.items():
        if path.startswith("chart/templates/"):
            made += objects(path, _filled(text, values, {"Name": release, "Namespace": namespace}))
    return made


def _filled(text: str, values: dict[str, Any], release: dict[str, str]) -> str:
    def chosen(match: re.Match[str]) -> str:
        key, _, equal = match[1].removeprefix("eq ").removeprefix(".Values.").partition(" ")
        return match[2] if (values[key] == json.loads(equal) if equal else values[key]) else ""

    def value(match: re.Match[str]) -> str:
        what, _, name = match[1].rpartition(".")
        if what == "toJson .Values":
            return json.dumps(values[name])
        if what == ".Values":
            return str(values[name])
        assert what == ".Release", match[0]
        return release[name]

    def spliced(match: re.Match[str]) -> str:
        given = values[match[1]]
        return "\n" + indent(yaml.safe_dump(given), int(match[2]) * " ").rstrip() if given else ""

    text = re.sub(r"\s*\{\{- with \.Values\.(\w+) \}\}\{\{ toYaml \. \| nindent (\d+) \}\}\{\{ end \}\}", spliced, text)
    text = re.sub(r"\{\{-? if (.+?) \}\}(.*?)\{\{-? end \}\}", chosen, text, flags=re.DOTALL)
    rules = TREE["chart/rules.yml"].replace("\n", "\n  ")
    marked = text.replace('{{ .Files.Get "rules.yml" | indent 2 }}', "\0")
    return re.sub(r"\{\{ (.+?) \}\}", value, marked).replace("\0", "  " + rules)
