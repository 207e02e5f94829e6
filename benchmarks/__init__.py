"""How fast it is, each number beside the limit that it is measured against. `python -m benchmarks [names...] [--quick]`."""
