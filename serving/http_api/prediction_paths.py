"""The paths that ask for a prediction over HTTP, and their dialects."""

from __future__ import annotations

from serving.protocols import open_inference, predict_v1

ROUTES = {
    ("v1", "name"): "/v1/models/{model}:predict",
    ("v1", "version"): "/v1/models/{model}/versions/{version}:predict",
    ("v1", "label"): "/v1/models/{model}/labels/{label}:predict",
    ("v2", "name"): "/v2/models/{model}/infer",
    ("v2", "version"): "/v2/models/{model}/versions/{version}/infer",
}
CODECS = {"v1": predict_v1.Codec, "v2": open_inference.Codec}
