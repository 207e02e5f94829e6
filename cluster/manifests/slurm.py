"""Slurm: one batch job of whole nodes that starts Ray on them, trains, and asks to be queued again when its time is over."""

from __future__ import annotations

import shlex

from cluster.manifests.carried import Carried, carried
from cluster.manifests.kuberay import name_of
from cluster.manifests.needs import Group, alike, deploy_of
from cluster.manifests.words import Deploy
from cluster.site import Site
from mllm.recipe import Recipe

EXIT_STOPPED = 143
"""What `mllm train` ends with where it was asked to stop, has saved and can go on."""


def slurm(recipe: Recipe, site: Site, run: str) -> tuple[str, Carried]:
    """The script for `sbatch`, and the two files that lie beside it. Raises SiteError for what a site must say and does not."""
    deploy = deploy_of(site)
    group = alike(recipe, site)
    shared = deploy.shared
    files = carried(recipe, site, shared)
    blocks = (
        _directives(group, deploy, run),
        _begin(deploy, site),
        _RAY.format(**_numbers(group)),
        _TRAIN.format(**_told(run)),
    )
    return "\n".join(blocks), files


def _directives(group: Group, deploy: Deploy, run: str) -> str:
    slurm = deploy.slurm
    nodes = str(group.most) if group.fewest == group.most else f"{group.fewest}-{group.most}"
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "constraint": slurm.constraint}
    lines = [
        f"job-name={name_of(run)}",
        f"nodes={nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={group.node.cpus}",
        *([f"gpus-per-node={group.gpus}"] if group.gpus else []),
        f"mem={group.node.memory.removesuffix('i')}",
        "exclusive",
        f"time={slurm.time}",
        f"signal=B:TERM@{slurm.notice}",
        "requeue",
        "no-kill",
        "open-mode=append",
        *(f"{name}={value}" for name, value in named.items() if value),
    ]
    return "#!/bin/bash\n" + "".join(f"#SBATCH --{line}\n" for line in lines)


def _begin(deploy: Deploy, site: Site) -> str:
    """Environment, files and token. A token of the job's own is made where the site names none."""
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in deploy.env.items())
    if site.ray_token_file:
        token = f"export RAY_AUTH_TOKEN_PATH={shlex.quote(site.ray_token_file)}"
    else:
        token = (
            'export RAY_AUTH_TOKEN_PATH="$here/ray-token-$SLURM_JOB_ID"\n'
            "(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > \"$RAY_AUTH_TOKEN_PATH\")\n"
            "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"' EXIT"
        )
    return f"""{deploy.activate or "# mllm is on the PATH of every node, or deploy.activate in the site file brings it there."}
set -euo pipefail

here="${{MLLM_MANIFEST:-$SLURM_SUBMIT_DIR}}"
for file in recipe.json site.toml; do
    [ -f "$here/$file" ] || {{ echo "no $here/$file; submit from this script's folder, on a shared disk" >&2; exit 2; }}
done

# Who may use this job's Ray: who can read the token, which is this user.
export RAY_AUTH_MODE=token
{token}
{exports}"""


_RAY = """# The first node is the head, and trains as the others do.
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head="${{nodes[0]}}"
addresses="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)"
for address in $addresses; do [[ "$address" == *:* ]] || break; done # an IPv4 address where there is one
port=$((20000 + SLURM_JOB_ID % 10000))
has="--num-cpus={cpus} --num-gpus={gpus} --object-store-memory={store} --disable-usage-stats"

srun --nodes=1 --ntasks=1 --cpus-per-task={cpus} --no-kill --nodelist="$head" \\
    ray start --head --block --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 $has &
ray=($!)
for try in $(seq 60); do
    ray health-check --address "$address:$port" > /dev/null 2>&1 && break
    [ "$try" -lt 60 ] || {{ echo "Ray's head on $head does not answer; see above" >&2; exit 1; }}
    sleep 2
done
if [ "${{#nodes[@]}}" -gt 1 ]; then
    others=$((${{#nodes[@]}} - 1))
    srun --nodes="$others" --ntasks="$others" --cpus-per-task={cpus} --no-kill --exclude="$head" \\
        ray start --block --address="$address:$port" $has &
    ray+=($!)
fi
"""

_TRAIN = """# Told that its time is over, the run saves and stops; the same job, queued again, goes on.
export RAY_ADDRESS="$address:$port"
mllm train "$here/recipe.json" --site "$here/site.toml" --run {run} &
train=$!
trap 'kill -TERM "$train" 2> /dev/null || true' TERM
while :; do # `wait` ends with a signal, too, while the run is saving
    code=0
    wait "$train" || code=$?
    kill -0 "$train" 2> /dev/null || break
done
trap - TERM
kill "${{ray[@]}}" 2> /dev/null || true
wait "${{ray[@]}}" 2> /dev/null || true
if [ "$code" -eq {stopped} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _numbers(group: Group) -> dict[str, int]:
    return {"cpus": group.node.cpus, "gpus": group.gpus, "store": group.node.store * 9 // 10}


def _told(run: str) -> dict[str, str | int]:
    return {"run": shlex.quote(run), "stopped": EXIT_STOPPED}
