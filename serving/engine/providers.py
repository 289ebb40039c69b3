"""Execution providers: what onnxruntime runs a model with beside the processor, and the packages that bring them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache

from pydantic import ConfigDict, Field

from serving.documented import Documented

CPU = "CPUExecutionProvider"

PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    "NvTensorRTRTXExecutionProvider": "onnxruntime-trt-rtx",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "ROCMExecutionProvider": "onnxruntime-rocm",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "DmlExecutionProvider": "onnxruntime-directml",
    "CoreMLExecutionProvider": "onnxruntime",
}
"""Source: https://onnxruntime.ai/docs/install, and the packages on PyPI."""

# Who may write a model's settings may not thereby have a library loaded, a file read or written, or an address used, by
# the server: an option is refused that has one of these among its words.
_UNSAFE = re.compile(
    r"(?<![a-z])(paths?|dir|folder|files?|libs?|library|plugin|packages|xclbin|load|save|dump|external"
    r"|compute_stream|bytestream|address)(?![a-z])|^context$",
    re.IGNORECASE,
)


class Provider(Documented):
    """One provider: its name as onnxruntime has it, and its options, which onnxruntime takes as texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Such as OpenVINOExecutionProvider."""
    options: dict[str, str | int | float | bool] = Field(default={}, max_length=100)
    """As its page in onnxruntime's documentation has them, such as device_type."""


@cache
def installed() -> frozenset[str]:
    """Return the providers of the onnxruntime that is installed, by a process that ends: it takes tens of megabytes.

    Raises OSError or subprocess.SubprocessError.
    """
    code = "import onnxruntime; print(*onnxruntime.get_available_providers())"
    asked = [sys.executable, "-P", "-c", code]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)  # noqa: S603  our own words
    return frozenset(done.stdout.split())


def fault(providers: Iterable[Provider]) -> str:
    """Say what is wrong with providers that somebody wants, by name; empty where nothing is."""
    for provider in providers:
        name = provider.name
        try:
            there = installed()
        except (OSError, subprocess.SubprocessError):
            return "onnxruntime does not say which providers it has: see that it can be imported"
        if name not in there:
            if name not in PACKAGES:
                return f"{name}: the onnxruntime that is installed has {', '.join(sorted(there))}, and not this"
            where = " on macOS" if PACKAGES[name] == "onnxruntime" else ", in place of the package onnxruntime"
            return f"{name} is not installed: it comes with {PACKAGES[name]}{where}"
        unsafe = sorted(option for option in provider.options if _UNSAFE.search(option))
        if unsafe:
            return f"{name}: {', '.join(unsafe)}: a models folder may not name files, libraries or memory"
    return ""
