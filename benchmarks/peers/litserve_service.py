"""The forest in LitServe: `litserve_service.py PORT`. MODEL names the file."""

import os
import sys

import litserve
import numpy as np
import onnxruntime


class Forest(litserve.LitAPI):
    """One ONNX file."""

    def setup(self, device):
        """Load it."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["MODEL"], options)

    def decode_request(self, request):
        """Read the rows of one request."""
        return np.array(request["rows"], np.float32)

    def predict(self, rows):
        """Return the probabilities, float32 [rows, classes]."""
        return self._session.run(["probabilities"], {"features": rows})[0]

    def encode_response(self, output):
        """Write the answer to one request."""
        return output.tolist()


if __name__ == "__main__":
    server = litserve.LitServer(Forest(), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="error",
        access_log=False,
        generate_client_file=False,
    )
