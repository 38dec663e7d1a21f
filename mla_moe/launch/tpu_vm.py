"""TPU VMs: lines for `gcloud` that create a slice, install the package on its hosts and train on them."""

import shlex

from mla_moe.config import require
from mla_moe.launch.job import COORDINATOR_PORT, TPUS, Hosts, Job, restart_loop


def script(job: Job, hosts: Hosts, zone: str) -> str:
    """A shell script, to run in the repository's folder. It ends when the run does; run again, it resumes it."""
    tpu = TPUS.get(hosts.kind)
    ok = tpu is not None and tpu.vm is not None
    fix = "has no TPU VMs; use gke, or for GPUs slurm"
    require(ok, "topology", f"{hosts.kind}:{hosts.shape}", fix)
    assert tpu is not None
    require(hosts.slices == 1, "slices", hosts.slices, "must be 1: gke launches several slices")
    require(zone != "", "zone", zone, "name the zone of the TPUs, such as us-east5-a")
    where = shlex.join([job.name, f"--zone={zone}"])
    install = "python3 -m venv .venv && .venv/bin/pip install -q -c requirements.lock -e '.[tpu,gcs,s3,serve]'"
    unpack = shlex.quote(f"cd mla_moe && tar xzf source.tgz && {install}")
    return f"""\
#!/bin/bash
set -euo pipefail
queued() {{
  gcloud compute tpus queued-resources describe {where} --format='value(state.state)'
}}
queued 2> /dev/null || gcloud compute tpus queued-resources create {where} --node-id={job.name} \\
  --type={tpu.vm} --topology={hosts.shape} --runtime-version={tpu.runtime}
until state=$(queued) && [ "$state" = ACTIVE ]; do
  case $state in FAILED | SUSPENDED) echo "the TPUs are $state: delete the queued resource first" >&2; exit 1 ;; esac
  sleep 30
done
gcloud compute tpus tpu-vm ssh {where} --worker=all --command='mkdir -p mla_moe'
source=$(mktemp --suffix=.tgz)
trap 'rm -f "$source"' EXIT
git archive HEAD | gzip > "$source"
gcloud compute tpus tpu-vm scp "$source" {job.name}:mla_moe/source.tgz --zone={shlex.quote(zone)} --worker=all
gcloud compute tpus tpu-vm ssh {where} --worker=all --command={unpack}
gcloud compute tpus tpu-vm ssh {where} --worker=all --command={shlex.quote(host_script(job))}
"""


def host_script(job: Job) -> str:
    """What each host of the slice runs: it reads its index and the addresses of all hosts from the metadata server."""
    train = shlex.join([".venv/bin/mla-moe", *job.train])
    return """\
cd mla_moe || exit 2
attribute() {
  curl -sf -H 'Metadata-Flavor: Google' \\
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}
hosts=$(attribute worker-network-endpoints) || exit 2
number=$(attribute agent-worker-number) || exit 2
count=$(echo "$hosts" | tr ',' '\\n' | wc -l)
first=${hosts%%,*}
""" + restart_loop(
        f'{train} --distributed.coordinator "${{first##*:}}:{COORDINATOR_PORT}" --distributed.processes "$count" '
        '--distributed.process "$number"'
    )
