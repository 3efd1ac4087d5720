# shellcheck shell=sh
# Makes the root filesystem, without mounting and without being root. Sourced by
# build.sh; this file, init/ and the agent decide the cache's key.

# Fixed, so that two builds from the same inputs name the same filesystem.
root_uuid=c04ac1e0-0000-4000-8000-000000000001
root_mib=64

build_init() {
    gcc -std=gnu11 -O2 -Wall -Wextra -Werror -static -nostdlib -ffreestanding -fno-pie -no-pie \
        -fno-stack-protector -mgeneral-regs-only -s -Wl,--build-id=none \
        -o "$1" "$here"/init/*.c
}

build_rootfs() {
    say "making the root filesystem"
    mkdir -p root/bin root/sbin root/etc root/dev root/proc root/sys root/tmp root/root root/data
    build_init root/sbin/init
    cp "$agent" root/sbin/coracle-agent
    cp /bin/busybox root/bin/busybox
    for applet in $(/bin/busybox --list); do
        [ -e "root/bin/$applet" ] || ln -s busybox "root/bin/$applet"
    done
    echo 'root:x:0:0:root:/root:/bin/sh' > root/etc/passwd
    echo 'root:x:0:' > root/etc/group
    # Tables are written now: a guest that initialises them in the background
    # would write to a disk that a test believes is quiet.
    mke2fs -q -t ext4 -b 4096 -m 0 -L coracle-root -U "$root_uuid" \
        -E "root_owner=0:0,hash_seed=$root_uuid,lazy_itable_init=0,lazy_journal_init=0" \
        -d root rootfs.ext4 "${root_mib}M" >&2
    rm -r root
    chmod 444 rootfs.ext4
}
