"""How often Python looks for garbage that refers to itself.

By default after every 700 objects more. While a process imports torch and transformers there is hardly any to be found, and the
looking takes a quarter of the time: so it is done rarely until the process begins its work, and then as usual, since what refers
to itself may hold tensors.
"""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
"""New objects, and younger collections, after which each generation is looked through."""

RARE = (1_000_000, 10, 10)


def collect_rarely() -> None:
    """For a process that imports."""
    gc.set_threshold(*RARE)


def collect_usually() -> None:
    """For a process that works."""
    gc.set_threshold(*USUAL)
