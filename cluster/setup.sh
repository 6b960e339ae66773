#!/usr/bin/env bash
# Makes an Ubuntu 24.04 machine a node: the shared folder, raytickets, the environment.
# It can run again. `setup.sh boto3` installs further packages.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
environment=$HOME/raytickets-env
set -a
. "$checkout/cluster/cluster.env"
set +a

# A new machine updates its lists itself, and that lock is not waited for.
for _ in $(seq 30); do sudo apt-get -qq update && break; sleep 10; done
sudo apt-get -qq -y -o DPkg::Lock::Timeout=300 install nfs-common procps python3-venv rsync

if [ -n "$RAYTICKETS_NFS" ] && ! mountpoint -q /mnt/raytickets; then
    sudo mkdir -p /mnt/raytickets
    sudo mount -t nfs -o hard,timeo=600,retrans=2,noresvport "$RAYTICKETS_NFS" /mnt/raytickets
fi
sudo mkdir -p /mnt/raytickets
[ -w /mnt/raytickets ] || sudo chown "$(id -u):$(id -g)" /mnt/raytickets
mkdir -p /mnt/raytickets/data
case $RAYTICKETS_STORAGE in *://*) ;; *) mkdir -p "$RAYTICKETS_STORAGE" ;; esac

# The versions are those that pyproject.toml pins, PyTorch's CUDA among them where there is a GPU.
backend=cpu
if command -v nvidia-smi >/dev/null; then backend=cu132; fi
[ -x "$environment/bin/uv" ] || python3 -m venv "$environment"
"$environment/bin/pip" install --quiet --upgrade uv
cd "$checkout"
"$environment/bin/uv" pip install --quiet --python "$environment/bin/python" \
    --torch-backend "$backend" ".[cluster]" "$@"

if ! grep -q raytickets-env ~/.bashrc; then
    cat >>~/.bashrc <<EOF
export PATH="$environment/bin:\$PATH"
set -a; . "$checkout/cluster/cluster.env"; set +a
EOF
fi
