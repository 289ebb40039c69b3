"""Clients that can't live beside the others, each in a virtual environment of its own, from PyPI alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2] / ".venv-conformance"

PACKAGES: dict[str, tuple[str, ...]] = {
    # The last wheel whose perf_analyzer runs with the C library of Debian 12; it wants Debian's libb64-0d too.
    "perf": ("--no-deps", "tritonclient==2.51.0", "nvidia-cuda-runtime-cu12==12.9.79"),
    "kserve": ("kserve==0.21.0", "onnxruntime"),
    # The project itself, where the version of protobuf is the next one.
    "protobuf7": ("--editable", str(ROOT.parent), "protobuf>=7,<8"),
    # With its own ruff, which it formats with.
    "openapi": ("openapi-python-client==0.29.1", "ruff"),
    # evidently does not run on pandas 3, which the project is developed with.
    "drift": ("evidently==0.7.23", "river==0.26.1", "pandas<3"),
    "shap": ("shap==0.51.0", "scikit-learn==1.9.1", "pandas==3.1.1", "pyarrow"),
    "mlflow": ("mlflow-skinny==3.17.2", "pandas", "scipy", "onnx", "onnxruntime"),
    # Ray's pins are for it alone.
    "ray": ("--editable", f"{ROOT.parent}[bulk]", "ray[data,serve]==2.60.0", "psutil"),
    "mlserver": ("mlserver==1.7.1", "onnxruntime"),
    # Helm 4 as a library: no registry of ours has its command.
    "helm": ("helm-python-sdk==0.2.2",),
}


def environment(name: str) -> Path:
    """Return the folder of an environment, made on first use."""
    folder = ROOT / name
    done = folder / "complete"
    wanted = " ".join(PACKAGES[name])
    if not done.exists() or done.read_text() != wanted:
        print(f"making {folder.relative_to(ROOT.parent)}: {wanted}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES[name]], check=True)
        done.write_text(wanted)
    return folder


def perf_analyzer() -> tuple[str, dict[str, str]]:
    """Return the program, and the environment variables that it runs with."""
    folder = environment("perf")
    library = next(folder.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib"))
    return str(folder / "bin" / "perf_analyzer"), {**os.environ, "LD_LIBRARY_PATH": str(library)}
