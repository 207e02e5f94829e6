"""`mllm doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from cluster.controller import versions
from cluster.site import Site, SiteError
from pipelines.place import Place


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and -- where it matters -- what to do. `fatal` stops training."""

    what: str
    found: str
    advice: str = ""
    fatal: bool = False


def doctor(site: Site) -> int:
    """Print the findings. Returns 1 when one of them would stop a run, else 0."""
    findings = [*_machine(), *_packages(), *_storage(site)]
    for finding in findings:
        sign = "missing" if finding.fatal else "note" if finding.advice else "ok"
        print(f"{sign:<8} {finding.what:<34} {finding.found}" + (f"; {finding.advice}" if finding.advice else ""))
    return int(any(finding.fatal for finding in findings))


def _machine() -> list[Finding]:
    import torch

    cores = os.cpu_count() or 1
    found = [Finding("cores", str(cores), "" if cores > 1 else "two or more make the smoke run bearable")]
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        found.append(Finding("GPUs", f"{torch.cuda.device_count()} x {', '.join(names)}"))
    else:
        found.append(Finding("GPUs", "none", "training runs on CPU with gloo: right for the smoke recipe alone"))
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    advice = "" if shm > 2**30 else "Ray's object store wants 1 GiB or more; in a container pass --shm-size"
    found.append(Finding("shared memory", f"{shm / 2**30:.1f} GiB free", advice))
    return found


def _packages() -> list[Finding]:
    import torch

    found = [Finding(name, version) for name, version in versions().items()]
    if importlib.util.find_spec("torchvision") and not torch.cuda.is_available():
        advice = "beside a CPU build of torch it breaks transformers: pip uninstall torchvision timm"
        found.append(Finding("torchvision", "installed", advice, fatal=True))
    from ops.attention import available, chosen

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = "; ".join(f"{backend} {reason}" for backend, reason in available().items() if reason)
    taken = chosen(device, torch.bfloat16)
    found.append(Finding("attention", f"{taken}" + (f" ({reasons})" if reasons else "")))
    return found


def _storage(site: Site) -> list[Finding]:
    found = [_runs(Place(site.runs))]
    for name in site.corpora:
        try:
            missing = [uri for uri in site.shards(name)[:1] if "://" not in uri and not Path(uri).is_file()]
            advice = f"{missing[0]} is not there; mend [corpora]" if missing else ""
            found.append(Finding(f"corpus {name}", f"{len(site.shards(name))} shards", advice, fatal=bool(missing)))
        except SiteError as error:
            found.append(Finding(f"corpus {name}", "not found", str(error), fatal=True))
    return found


def _runs(runs: Place) -> Finding:
    if runs.local:
        nearest = next(folder for folder in (runs.path, *runs.path.parents) if folder.is_dir())
        writable = os.access(nearest, os.W_OK)
        free = shutil.disk_usage(nearest).free / 2**30
        advice = "" if writable else f"nothing can be written under {nearest}; set runs in the site file"
        return Finding("runs", f"{runs}, {free:.0f} GiB free", advice, fatal=not writable)
    probe = runs / f".doctor-{uuid4().hex}"
    try:
        kept = probe.create(b"first") and not probe.create(b"second")  # else two controllers could take one lease
        probe.remove()
    except OSError as error:
        return Finding("runs", str(runs), f"nothing can be written there ({error}); mend [storage] or runs", fatal=True)
    advice = "" if kept else "its S3 ignores If-None-Match, which keeps two controllers apart; run only one at a time"
    return Finding("runs", f"{runs}, writable", advice)
