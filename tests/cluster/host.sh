#!/usr/bin/env bash
# A host in namespaces of its own (network, processes, mounts, name), with an sshd on port 22:
#   unshare --net --pid --mount --uts --fork --kill-child --mount-proc \
#       host.sh FOLDER NAME PATH...
# FOLDER/NAME is its home, with .ssh/authorized_keys; FOLDER/shared is what all hosts have at
# /mnt/raytickets; PATHs stay what they are even below the home. All that runs inside ends with it.
set -euo pipefail
folder=$1 name=$2
shift 2
hostname "$name"
mkdir -p "$folder/$name.ray" /tmp/ray
for path in "$@"; do
    case $path in "$HOME"/*)
        mkdir -p "$folder/$name/${path#"$HOME"/}"
        mount --bind "$path" "$folder/$name/${path#"$HOME"/}"
    esac
done
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /run
mkdir -p /mnt/raytickets /run/sshd
mount --bind "$folder/shared" /mnt/raytickets
mount --bind "$folder/$name.ray" /tmp/ray
mount --rbind "$folder/$name" "$HOME"
ip link set lo up
ssh-keygen -q -t ed25519 -N "" -f ~/.ssh/host_key
exec /usr/sbin/sshd -D -e -o HostKey="$HOME/.ssh/host_key" -o PidFile=none
