"""A local Ray that is quiet, and gone when the run is.

Everything that Ray and its libraries have to say goes to the run's log files; a person sees only what this project prints.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default polls every 2 s, and a dead worker is noticed by a poll
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # of a lost node Ray asks workers for so long before it takes fewer
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}

ALONE = {
    "RAY_AUTH_MODE": "disabled",  # a cluster of one process tree on loopback; tokens would be written to the home folder
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody drains a laptop
}
"""The same, for a Ray that is started here and is gone when the run is."""


class NoCluster(RuntimeError):
    """No Ray cluster answers at the address."""


class WrongToken(ValueError):
    """The cluster asks for a token, and what there is of one is not it."""


def quieten(logs: Path) -> None:
    """Send third parties' logging and warnings to files under `logs`. Call it before Ray or transformers is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(logs / "driver.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("DeepSpeed").addFilter(_aside)  # which has a way of its own to the terminal


def _aside(record: logging.LogRecord) -> bool:
    """Take a record to the root logger's file, and no further."""
    logging.getLogger().handle(record)
    return False


def divert_ray_logging() -> None:
    """Take Ray's own console handlers away; its records still reach the root logger's file."""
    for name in list(logging.root.manager.loggerDict):
        if name == "ray" or name.startswith("ray."):
            logger = logging.getLogger(name)
            logger.handlers = [h for h in logger.handlers if not isinstance(h, logging.StreamHandler)]
            logger.propagate = True


@contextmanager
def ray_running(address: str | None, cpus: int, logs: Path, token_file: str | None = None) -> Iterator[None]:
    """Join the Ray at `address`, or start one here with `cpus` logical CPUs and stop it afterwards.

    `token_file` holds the token of the Ray at `address`. Raises NoCluster, and WrongToken where that Ray asks for another one.
    Logical CPUs are promises, not cores: trainers and preprocessing actors may be more than the machine has.
    """
    quieten(logs)
    if not address:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
    elif token_file:
        show_token(token_file)
    import ray

    if ray.is_initialized():
        yield
        return
    options = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    with ExitStack() as left:
        if address:
            _ask(address, token_file)
            try:
                ray.init(address=address, **options)
            except (ConnectionError, RuntimeError) as error:
                raise NoCluster(
                    f"no Ray cluster answers at {address} ({error}); start one (ray start --head), or mend ray_address in the "
                    "site file"
                ) from error
        else:
            from cluster.alone import alone

            store = min(OBJECT_STORE, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 5)
            ray.init(address=left.enter_context(alone(cpus, store)), **options)
        left.callback(ray.shutdown)
        divert_ray_logging()
        yield


def show_token(token_file: str) -> None:
    """Have Ray show the cluster the token in the file. It reads the file itself, and processes that are started here do too.

    Raises WrongToken where the file holds none.
    """
    try:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise WrongToken(f"ray_token_file {token_file} cannot be read: {why}; {_MEND}") from error
    if not token:
        raise WrongToken(f"ray_token_file {token_file} is empty; {_MEND}")
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = token_file
    os.environ.pop("RAY_AUTH_TOKEN", None)  # which Ray would take before the file


_MEND = "copy the head's token there (on the head: ray get-auth-token), or name its file with ray_token_file in the site file"


def _ask(address: str, token_file: str | None) -> None:
    """Raise WrongToken where the cluster refuses the token: `ray.init` would try for 20 s and say only that it did not connect.

    Whatever else may be wrong is left to `ray.init`.
    """
    import grpc
    from ray._private.authentication.grpc_authentication_client_interceptor import _get_authentication_metadata_tuple
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    messages: Any = gcs_service_pb2  # whose names are made when it is imported
    try:
        head = canonicalize_bootstrap_address(address)
        metadata = _get_authentication_metadata_tuple()
    except AuthenticationError as error:  # by a mode in the environment that no token goes with
        raise WrongToken(f"the Ray cluster at {address} cannot be shown a token: {error.message}; {_MEND}") from error
    except (ConnectionError, ValueError):
        return
    if head is None:
        return
    with grpc.insecure_channel(head) as channel:
        try:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            stub.CheckAlive(messages.CheckAliveRequest(), timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                return
            shown = f"the token in {token_file} is not its own" if token_file else "the site names no ray_token_file"
            raise WrongToken(
                f"the Ray cluster at {address} refuses this command ({error.details()}): {shown}; {_MEND}"
            ) from error


OBJECT_STORE = 2**31
"""Bytes of shared memory for packs in flight on a laptop, if that is no more than a fifth of its memory. Only what is in
flight is used; but Ray Data keeps to a part of it, and with a quarter of this holds its actors back."""
