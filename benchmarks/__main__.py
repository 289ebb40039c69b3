"""`make bench`: the servers beside each other, then the protocols."""

import sys

from benchmarks import protocols, throughput

raise SystemExit(throughput.main() or (0 if sys.argv[1:] else protocols.main()))
