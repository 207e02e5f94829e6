"""Tensor functions, in torch alone. See `ops/README.md` for the shape letters."""
