"""Drills: long proofs with real processes, sockets and signals (`make drill`); `make test` runs short forms of them."""
