"""The forest in Ray Serve: `ray_service.py PORT`. MODEL names the file."""

import os
import signal
import sys

import numpy as np
import onnxruntime
import ray
from ray import serve


@serve.deployment(max_ongoing_requests=1000)
class Forest:
    """One ONNX file; the rows of several requests run together."""

    def __init__(self, model):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0)
    async def predict(self, requests):
        """Return the probabilities of each request, float32 [rows, classes]."""
        scores = self._session.run(["probabilities"], {"features": np.concatenate(requests)})[0]
        return np.split(scores, np.cumsum([len(rows) for rows in requests])[:-1])

    async def __call__(self, request):
        """Answer one request."""
        rows = np.array((await request.json())["rows"], np.float32)
        return (await self.predict(rows)).tolist()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config={"enable_access_log": False}
    )
    serve.run(Forest.bind(os.environ["MODEL"]), blocking=True)  # type: ignore[attr-defined]
