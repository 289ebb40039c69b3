"""`serving manifests`: what Kubernetes needs to run this server."""

from __future__ import annotations

from serving.commands.written import writer
from serving.manifests.tree import tree

manifests = writer(
    "manifests",
    "Write manifests for Kubernetes.",
    "Write a kustomize base with components and overlays, a Helm chart, and a runtime for KServe.",
    tree,
)
