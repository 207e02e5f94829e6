"""A local Ray that is quiet, and gone when the run is.

Everything that Ray and its libraries have to say goes to the run's log files; a person sees only what this project prints.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def quieten(logs: Path) -> None:
    """Send third parties' logging and warnings to files under `logs`. Call it before Ray or transformers is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(logs / "driver.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def divert_ray_logging() -> None:
    """Take Ray's own console handlers away; its records still reach the root logger's file."""
    for name in list(logging.root.manager.loggerDict):
        if name == "ray" or name.startswith("ray."):
            logger = logging.getLogger(name)
            logger.handlers = [h for h in logger.handlers if not isinstance(h, logging.StreamHandler)]
            logger.propagate = True


@contextmanager
def ray_running(address: str | None, cpus: int, logs: Path) -> Iterator[None]:
    """Join the Ray at `address`, or start one here with `cpus` logical CPUs and stop it afterwards.

    Logical CPUs are promises, not cores: trainers and preprocessing actors may be more than the machine has.
    """
    quieten(logs)
    if not address:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    options = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError) as error:
            raise NoCluster(
                f"no Ray cluster answers at {address} ({error}); start one (ray start --head), or mend ray_address in the "
                "site file"
            ) from error
    else:
        store = min(OBJECT_STORE, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 5)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=store, **options)
    divert_ray_logging()
    try:
        yield
    finally:
        ray.shutdown()


OBJECT_STORE = 2**31
"""Bytes of shared memory for packs in flight on a laptop, if that is no more than a fifth of its memory. Only what is in
flight is used; but Ray Data keeps to a part of it, and with a quarter of this holds its actors back."""
