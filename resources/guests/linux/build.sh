#!/bin/sh
# Builds the Linux guest: kernels from Debian's linux-source package, an ext4 root
# filesystem with our init and busybox, and a manifest that says what is where.
#
#     build.sh [smp|acpi|native]…
#
# Without arguments: `smp` and `acpi`, and `native` where the processor can run it.
# The result lies in a cache outside the clone and is built once for each set of
# inputs. Says what it does on stderr; the last line, alone on stdout, is the
# directory that holds manifest.json.
set -eu
export LC_ALL=C
unset MAKEFLAGS MFLAGS MAKELEVEL # a make that runs this has its own

here=$(cd "$(dirname "$0")" && pwd)
cache=${CORACLE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/coracle}/linux
release=6.1
tarball=/usr/src/linux-source-$release.tar.xz
packages="linux-source-$release gcc libc6-dev make flex bison bc libelf-dev xz-utils lz4 patch busybox-static e2fsprogs"

# A fixed UUID: two builds from the same inputs name the same root filesystem.
root_uuid=c04ac1e0-0000-4000-8000-000000000001
root_mib=64

say() { echo "linux guest: $*" >&2; }
fail() { say "$*"; exit 1; }

host_has_virtualization() { grep -qwE 'vmx|svm' /proc/cpuinfo; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_missing_packages() {
    missing=
    for package in $packages; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    say "installing$missing"
    [ "$(id -u)" = 0 ] || say "that needs sudo, which may ask for your password"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # a list of words
    as_root apt-get install -qq -y --no-install-recommends $missing >&2 ||
        { as_root apt-get update -qq >&2 &&
            as_root apt-get install -qq -y --no-install-recommends $missing >&2; } ||
        fail "cannot install$missing; on other systems than Debian 12 install their equivalents by hand"
}

# key FILE|WORD…: a name for what is built from these files and words.
key() {
    for input in "$@"; do
        if [ -f "$input" ]; then cat "$input"; else echo "$input"; fi
    done | sha256sum | cut -c1-16
}

# once NAME COMMAND…: makes $cache/NAME by running COMMAND in an empty directory.
# An interrupted build leaves nothing under that name.
once() {
    name=$1
    shift
    [ ! -d "$cache/$name" ] || return 0
    rm -rf "$cache/$name.new"
    mkdir "$cache/$name.new"
    (
        cd "$cache/$name.new"
        "$@"
    )
    mv "$cache/$name.new" "$cache/$name"
}

# quietly LOG COMMAND…: runs COMMAND with its output in LOG, and counts aloud what it compiles.
quietly() {
    log=$1
    shift
    "$@" > "$log" 2>&1 &
    job=$!
    seconds=0
    while kill -0 $job 2>/dev/null; do
        sleep 1
        seconds=$((seconds + 1))
        [ $((seconds % 20)) != 0 ] ||
            say "  $seconds s, $(grep -c '^  CC' "$log" || true) files compiled"
    done
    wait $job || { tail -n 30 "$log" >&2; fail "failed: $*"; }
}

unpack_source() {
    say "unpacking $tarball"
    # Other architectures and what no virtual machine has: half of the files.
    tar -xf "$tarball" --strip-components=1 \
        --exclude="linux-source-$release/arch/[a-w]*/*.[chS]" --exclude="*.dts*" \
        --exclude="linux-source-$release/Documentation/*.[ry]*" \
        --exclude="linux-source-$release/tools/testing/*" \
        --exclude="linux-source-$release/drivers/gpu/*.[ch]" \
        --exclude="linux-source-$release/drivers/net/[ew]*/*.[ch]" \
        --exclude="linux-source-$release/drivers/media/*.[ch]" \
        --exclude="linux-source-$release/drivers/staging/*.[ch]" \
        --exclude="linux-source-$release/sound/*.[ch]"
}

# Which fragments of config/ make a variant.
fragments() {
    case $1 in
    smp) echo base acpi cmdline-devices emulated ;;
    acpi) echo base acpi emulated ;;
    native) echo base acpi cmdline-devices ;;
    esac
}

# configure VARIANT: .config in build/, and a complaint if Kconfig refused a wish.
configure() {
    for fragment in $(fragments "$1"); do cat "$here/config/$fragment.config"; done > wishes
    make -s -C source O="$PWD/build" KCONFIG_ALLCONFIG="$PWD/wishes" allnoconfig > configure.log 2>&1 ||
        { cat configure.log >&2; fail "cannot configure the kernel"; }
    refused=$(grep '^CONFIG_' wishes | grep -vxF -f build/.config || true)
    [ -z "$refused" ] || fail "variant $1: Kconfig refused $refused"
}

# Compiles the variants one after the other in one build tree. They differ in a
# few options, so all but the first take seconds. `native` comes last: it is the
# one without the patch.
build_kernels() {
    mkdir source build
    (cd source && unpack_source)
    patch -s -d source -p1 --no-backup-if-mismatch < "$here/patches/$release-emulated-cpl0.patch"
    export KBUILD_BUILD_TIMESTAMP=2026-01-01 KBUILD_BUILD_USER=coracle KBUILD_BUILD_HOST=coracle
    for variant in "$@"; do
        say "compiling the kernel, variant $variant (the first takes some 4 minutes on two cores)"
        [ "$variant" != native ] ||
            patch -s -R -d source -p1 --no-backup-if-mismatch < "$here/patches/$release-emulated-cpl0.patch"
        configure "$variant"
        # Code that runs once counts as cold, and gcc would clear memory there one
        # byte a step (REP STOSB); each step costs the same where it is emulated.
        quietly make.log make -C source O="$PWD/build" -j"$(nproc)" \
            KCFLAGS=-mstringop-strategy=rep_8byte vmlinux bzImage
        strip -o "vmlinux-$variant" build/vmlinux
        cp build/arch/x86/boot/bzImage "bzImage-$variant"
    done
    rm -rf source build wishes ./*.log
    chmod 444 vmlinux-* bzImage-*
}

build_init() {
    gcc -std=gnu11 -O2 -Wall -Wextra -Werror -static -nostdlib -ffreestanding -fno-pie -no-pie \
        -fno-stack-protector -mgeneral-regs-only -s -Wl,--build-id=none \
        -o "$1" "$here/init/init.c"
}

build_rootfs() {
    say "making the root filesystem"
    mkdir -p root/bin root/sbin root/etc root/dev root/proc root/sys root/tmp root/root root/data
    build_init root/sbin/init
    cp /bin/busybox root/bin/busybox
    for applet in $(/bin/busybox --list); do
        [ -e "root/bin/$applet" ] || ln -s busybox "root/bin/$applet"
    done
    echo 'root:x:0:0:root:/root:/bin/sh' > root/etc/passwd
    echo 'root:x:0:' > root/etc/group
    echo coracle > root/etc/hostname
    # Tables are written now: a guest that initialises them in the background
    # would write to a disk that a test believes is quiet.
    mke2fs -q -t ext4 -b 4096 -m 0 -L coracle-root -U "$root_uuid" \
        -E "root_owner=0:0,hash_seed=$root_uuid,lazy_itable_init=0,lazy_journal_init=0" \
        -d root rootfs.ext4 "${root_mib}M" >&2
    rm -r root
    chmod 444 rootfs.ext4
}

# The boot arguments of a variant on a kind of host. The monitor, like Firecracker,
# adds root= and the virtio_mmio.device= parameters itself.
boot_args() {
    args="console=ttyS0 reboot=k panic=-1 quiet"
    [ "$1" = acpi ] || args="$args acpi=off"
    case $2 in
    emulating) args="$args clearcpuid=151,158" ;;
    emulating_without_template)
        args="$args clearcpuid=141,145,151,154,158,288,295,297,298,306,308,311,312,580" ;;
    esac
    echo "$args"
}

write_manifest() {
    kernels=$1
    rootfs=$2
    shift 2
    separator=
    {
        echo '{'
        echo "  \"host\": \"$host\","
        echo "  \"run\": \"$run\","
        echo "  \"rootfs\": \"$cache/$rootfs/rootfs.ext4\","
        echo '  "kernels": {'
        for variant in "$@"; do
            printf '%s' "$separator"
            separator=",
"
            echo "    \"$variant\": {"
            echo "      \"vmlinux\": \"$cache/$kernels/vmlinux-$variant\","
            echo "      \"bzimage\": \"$cache/$kernels/bzImage-$variant\","
            echo '      "boot_args": {'
            [ "$variant" = native ] || for kind in emulating emulating_without_template; do
                echo "        \"$kind\": \"$(boot_args "$variant" $kind)\","
            done
            echo "        \"native\": \"$(boot_args "$variant" native)\""
            echo '      }'
            printf '    }'
        done
        printf '\n  }\n}\n'
    } > manifest.json
}

if host_has_virtualization; then
    host=native run=native default="smp acpi native"
else
    host=emulating run=smp default="smp acpi"
fi
chosen=${*:-$default}
variants=
for variant in smp acpi native; do
    case " $chosen " in *" $variant "*) variants="$variants $variant" ;; esac
done
for variant in $chosen; do
    [ -n "$(fragments "$variant")" ] || fail "no variant $variant: there are smp, acpi and native"
done

install_missing_packages
mkdir -p "$cache"
# One build at a time: a second caller waits here, then finds everything made.
exec 9> "$cache/lock"
flock -n 9 || { say "waiting for another build"; flock 9; }

tools="$(gcc -dumpfullversion) $(ld --version | head -n 1)"
# shellcheck disable=SC2086 # a list of words
kernels=kernels-$(key "$here/build.sh" "$here"/config/* "$here"/patches/* "$tools" \
    "$(dpkg-query -W "linux-source-$release")" $variants)
rootfs=rootfs-$(key "$here/build.sh" "$here"/init/* "$tools" "$(dpkg-query -W busybox-static e2fsprogs)")
result=guest-$(key "$here/build.sh" "$kernels" "$rootfs" "$host")

# shellcheck disable=SC2086
once "$kernels" build_kernels $variants
once "$rootfs" build_rootfs
# shellcheck disable=SC2086
once "$result" write_manifest "$kernels" "$rootfs" $variants
say "ready:$variants"
echo "$cache/$result"
