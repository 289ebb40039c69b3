"""Models that run: their sessions, batches and threads."""

import os

# Before onnxruntime is imported: its builds report each session and failed run, with the error's text and so with
# clients' values, to its maker. That also takes two threads a process and half of the time that a failure costs.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
