"""Whether this process may run Python that lies beside weights: what the site says, told to a process when it starts.

Off unless it is told otherwise: weights come from strangers, and their code would run with all that a worker may read and write.
"""

from __future__ import annotations


class _Current:
    trusted = False


def use(trusted: bool) -> None:
    """Trust such code from now on, or no longer, in this process."""
    _Current.trusted = trusted


def in_use() -> bool:
    return _Current.trusted
