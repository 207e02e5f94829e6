"""`mllm serve`: replicas of a model on Ray Serve, on a Ray of this machine's own or on the cluster that the site names."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from cluster.leaving import asked_to_stop
from cluster.local import divert_ray_logging, ray_running
from cluster.serving.find import Found, found
from cluster.site import Serving, Site

LOOPBACK = ("127.0.0.1", "::1", "localhost")

PATIENCE = 3600.0
"""Seconds after which a request that is still not answered is given up."""


@contextmanager
def served(export: Found, serving: Serving) -> Iterator[str]:
    """Serve the model on the Ray that runs, and say where. Raises RuntimeError where no replica comes up."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    divert_ray_logging()  # Serve's own too, which its import has begun

    from cluster.serving.replica import Replica

    logs: Any = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(
        http_options=HTTPOptions(host=serving.host, port=serving.port, request_timeout_s=PATIENCE), logging_config=logs
    )
    try:
        deployment = serve.deployment(
            Replica,
            name="chat",
            num_replicas=serving.replicas,
            # Those that wait and are written, and as many again to be told that there are too many.
            max_ongoing_requests=2 * (serving.together + serving.waiting),
            ray_actor_options={"num_cpus": 1, "num_gpus": serving.gpus},
            health_check_period_s=10,
            logging_config=logs,
        )
        application = deployment.bind(str(export.folder.resolve()), export.name, serving)
        serve.run(application, name="mllm", route_prefix="/")
        yield f"http://{serving.host}:{serving.port}"
    finally:
        serve.shutdown()


def serve(site: Site, checkpoint: str, port: int | None = None, replicas: int | None = None) -> None:
    """Serve the model of `checkpoint` until Ctrl-C or SIGTERM, `port` and `replicas` standing in place of the site's.

    Raises RunError where there is no such model, ValueError where the port is taken.
    """
    serving = site.serve
    serving = replace(
        serving,
        port=serving.port if port is None else port,
        replicas=serving.replicas if replicas is None else replicas,
    )
    _free(serving)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an export is whole: nothing is asked of a hub
    with found(site, checkpoint) as export:
        logs = Path(gettempdir()) / "mllm" / export.name / "serve"
        with (
            ExitStack() as ending,
            ray_running(site.ray_address, 1 + serving.replicas, logs, site.ray_token_file),
            asked_to_stop(),
            served(export, serving) as address,
        ):
            try:
                print(f"{export.name} at {address}/v1 (Ctrl-C ends)", flush=True)
                if serving.host not in LOOPBACK:
                    print(f"whoever reaches {serving.host} may use it: nobody is asked for a key", flush=True)
                while True:
                    time.sleep(3600)
            finally:  # Ray tells of its controller's death as of a failure, on standard output
                ending.enter_context(redirect_stdout(ending.enter_context((logs / "ending.log").open("w"))))


def _free(serving: Serving) -> None:
    """Raise ValueError unless the port is free here; Ray Serve says it at length, and after half a minute."""
    try:
        with socket.create_server((serving.host, serving.port)):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot listen at {serving.host}:{serving.port}: {error.strerror}; take another --port, or mend serve.host"
        ) from error
