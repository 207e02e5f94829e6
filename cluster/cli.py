"""The command line: what is typed is handed to its command, and what goes wrong becomes a sentence and an exit code."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Callable

from cluster import supervisor

DEBUG = "--debug"
"""A word of every command: whatever goes wrong is told with all that led to it."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mllm`. A mistake of the user's ends with a sentence and code 2, a fault of the program's with 70, Ctrl-C
    with 130, SIGTERM with 143 (docs/failures.md).
    """
    typed = sys.argv[1:] if argv is None else argv
    words = [word for word in typed if word != DEBUG]
    if words[:1] == ["train"]:
        if not supervisor.is_driver():  # which need not know what the words mean
            sys.exit(supervisor.supervise(typed))
        supervisor.die_with_parent()
    try:
        _read(words)()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `mllm plan ... | head` is no mistake
        sys.stderr.close()
    except Exception as error:
        sys.exit(_told(error, DEBUG in typed))


def _read(words: list[str]) -> Callable[[], None]:
    """The command that is meant, with what it was given. Ends the process where there is none, or help is asked for."""
    import tyro

    from cluster.commands import Command

    return tyro.cli(
        Command,  # type: ignore[arg-type]  # a union of types is no type to checkers; tyro takes it
        prog="mllm",
        description="Train multimodal language models on Ray. Every command takes --debug: a traceback with each error.",
        args=spread(words),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _told(error: Exception, debug: bool = False) -> int:
    """Say what went wrong, to those who `debug` with a traceback, and return the exit code.

    Most commands end well and need not import what they might meet.
    """
    from cluster.controller import ClusterLost, RunError
    from cluster.jobs import JobError
    from cluster.journal import Fenced
    from cluster.leaving import Stopped
    from cluster.local import NoCluster
    from cluster.profiling import NoProfile
    from pipelines.storage import StorageError

    if isinstance(error, Stopped):
        return 143
    # Mistakes in a site or a recipe are ValueErrors; what lies on a disk, or may not be read there, are OSErrors with a number.
    mistakes = (
        RunError | JobError | NoProfile | Fenced | StorageError | ValueError | FileNotFoundError | PermissionError
    )
    if debug:
        traceback.print_exception(error)
    if not isinstance(error, ClusterLost | NoCluster | mistakes) and not (isinstance(error, OSError) and error.errno):
        # A fault of this program's, told apart from a process that Ray ended.
        if logging.getLogger().handlers:  # a run's log file
            logging.getLogger("mllm").error("a fault of mllm's own", exc_info=error)
        words = f"{type(error).__name__}: {error}".strip(": ")
        print(
            f"error: {words}; this is a fault of mllm's own: the same command with --debug says where", file=sys.stderr
        )
        return 70
    print(f"error: {_mendable(error)}", file=sys.stderr)
    if isinstance(error, ClusterLost | NoCluster) and supervisor.is_driver():
        return supervisor.LOST if isinstance(error, ClusterLost) else supervisor.NOWHERE
    return 2


def _mendable(error: Exception) -> str:
    """The error's words; of the system's own, which say what and not what to do, both."""
    if not isinstance(error, OSError) or not error.errno or not error.filename:
        return str(error)
    mends = {
        errno.EACCES: "mend its rights, or name another place in the site file",
        errno.EROFS: "name another place in the site file",
        errno.ENOSPC: "make room there; then the same command goes on",
        errno.EDQUOT: "make room there; then the same command goes on",
        errno.ENOENT: "check the path, here and in the site file",
    }
    mend = mends.get(
        errno.EACCES if error.errno == errno.EPERM else error.errno, "check the path, here and in the site file"
    )
    return f"{error.filename}: {error.strerror}; {mend}"


def spread(words: list[str]) -> list[str]:
    """`data check X` is one command, and `-s a=1 b=2` is `-s a=1 -s b=2`."""
    if words[:1] == ["data"] and len(words) > 1:
        words = [f"data {words[1]}", *words[2:]]
    out: list[str] = []
    after = False
    for word in words:
        if after and "=" in word and not word.startswith("-") and out[-1] != "-s":
            out.append("-s")
        elif word.startswith("-") or "=" not in word:
            after = word == "-s"
        out.append(word)
    return out


if __name__ == "__main__":
    main()
