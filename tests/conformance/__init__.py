"""What a server conforms to, point by point, asked over the wire: `python -m tests.conformance --http URL`.

Knows nothing of the server it asks; the models' own metadata decides what is sent.
"""
