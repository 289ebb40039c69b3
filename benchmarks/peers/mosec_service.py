"""The forest in mosec, whose own arguments follow. MODEL names the file."""

import os

import numpy as np
import onnxruntime
from mosec import Server, Worker


class Forest(Worker):
    """One ONNX file; the rows of several requests run together."""

    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["MODEL"], options)

    def forward(self, data):
        """Return the probabilities of each request."""
        requests = [np.array(one["rows"], np.float32) for one in data]
        scores = self._session.run(["probabilities"], {"features": np.concatenate(requests)})[0]
        parts = np.split(scores, np.cumsum([len(rows) for rows in requests])[:-1])
        return [part.tolist() for part in parts]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Forest, num=1, max_batch_size=32, max_wait_time=1)
    server.run()
