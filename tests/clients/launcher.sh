#!/bin/sh
# Starts a machine by way of Firecracker's jailer, by its documented flags and layout: the names of the two programs come
# from outside. Prints the number of the monitor's process and the path of its API socket.
#
#   launcher.sh config|api|clean
#
# JAILER, MONITOR: the programs; KERNEL, BOOT_ARGS: the guest; BASE: where jails are; ID: the machine; OWNER: its user.
set -eu

name=$(basename "$MONITOR")
root=$BASE/$name/$ID/root

if [ "$1" = clean ]; then
	rm -rf "${BASE:?}/$name/$ID"
	rmdir "$BASE/$name"
	for group in /sys/fs/cgroup/*/"launchers-$ID/$ID" /sys/fs/cgroup/*/"launchers-$ID"; do
		if [ -d "$group" ]; then rmdir "$group"; fi
	done
	exit 0
fi

# Resources of the guest are linked, or copied, into the jail, and belong to its user.
mkdir -p "$root"
cp "$KERNEL" "$root/kernel"
: >"$root/log"
chown "$OWNER:$OWNER" "$root/kernel" "$root/log"

set -- "$1" --id "$ID" --exec-file "$MONITOR" --uid "$OWNER" --gid "$OWNER" --chroot-base-dir "$BASE" \
	--resource-limit no-file=1024 --resource-limit fsize=250000000 --daemonize --new-pid-ns
if [ -d /sys/fs/cgroup/cpuset ]; then
	set -- "$@" --parent-cgroup "launchers-$ID" --cgroup cpuset.mems=0 --cgroup "cpuset.cpus=$(cat /sys/fs/cgroup/cpuset/cpuset.cpus)"
fi
mode=$1
shift
if [ "$mode" = config ]; then
	printf '{"boot-source":{"kernel_image_path":"kernel","boot_args":"%s"},"drives":[],"logger":{"log_path":"log"}}' \
		"$BOOT_ARGS" >"$root/config.json"
	chown "$OWNER:$OWNER" "$root/config.json"
	"$JAILER" "$@" -- --config-file config.json --no-api
else
	"$JAILER" "$@" -- --log-path log
fi

# The process is in the file as soon as the jailer has returned; the socket comes a moment later.
socket=$root/run/firecracker.socket
if [ "$mode" = api ]; then
	tries=0
	while [ ! -S "$socket" ] && [ $tries -lt 600 ]; do
		sleep 0.05
		tries=$((tries + 1))
	done
fi
echo "$(cat "$root/$name.pid") $socket"
