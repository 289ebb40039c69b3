"""`make bench`: the servers beside each other, what sight costs, then the protocols."""

import sys

from benchmarks import cost, protocols, throughput

raise SystemExit(throughput.main() or (0 if sys.argv[1:] else cost.main([]) or protocols.main()))
