"""This server beside others around the same ONNX file, each set up as its own documentation advises."""
