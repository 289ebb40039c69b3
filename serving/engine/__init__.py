"""Models that run: their sessions, batches and threads."""

import os

# Before onnxruntime is imported: its builds have telemetry on, which keeps a file with an identity of the machine under
# the home folder, takes a thread, and half of the time that a failed run costs. A server reports to its owner alone.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
