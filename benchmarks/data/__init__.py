"""Data loading beside its limit and its peers: `make bench-data`. Nothing is imported here: competitors run elsewhere."""
