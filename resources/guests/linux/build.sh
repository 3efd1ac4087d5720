#!/bin/sh
# Builds the Linux guest: kernels from Debian's linux-source package, an ext4 root
# filesystem with our init and busybox, and a manifest that says what is where.
#
#     CORACLE_AGENT=PATH build.sh [smp|acpi|native]…
#
# PATH is coracle-agent, static: `make linux` builds it.
# Without arguments: `smp` and `acpi`, and `native` where the processor can run it.
# The result lies in a cache outside the clone and is built once for each set of
# inputs. Says what it does on stderr; the last line, alone on stdout, is the
# directory that holds manifest.json.
set -eu
export LC_ALL=C
unset MAKEFLAGS MFLAGS MAKELEVEL # a make that runs this has its own

here=$(cd "$(dirname "$0")" && pwd)
agent=${CORACLE_AGENT:?name the program coracle-agent, or run \`make linux\`, which builds it}
cache=${CORACLE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/coracle}/linux

# shellcheck source=kernel.sh
. "$here/kernel.sh"
# shellcheck source=rootfs.sh
. "$here/rootfs.sh"

packages="linux-source-$release gcc libc6-dev make flex bison bc libelf-dev xz-utils lz4 patch busybox-static e2fsprogs"

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

# The boot arguments of a variant on a kind of host. The monitor, like Firecracker,
# adds root= and the virtio_mmio.device= parameters itself.
boot_args() {
    args="console=ttyS0 reboot=k panic=-1 quiet"
    if [ "$1" = smp ]; then
        args="$args acpi=off"
    else
        # There is a keyboard for Ctrl-Alt-Del only: no mouse, nothing to probe.
        args="$args i8042.noaux i8042.nomux i8042.dumbkbd"
    fi
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
kernels=kernels-$(key "$here/kernel.sh" "$here"/config/* "$here"/patches/* "$tools" \
    "$(dpkg-query -W "linux-source-$release")" $variants)
rootfs=rootfs-$(key "$agent" "$here/rootfs.sh" "$here"/init/* "$tools" "$(dpkg-query -W busybox-static e2fsprogs)")
result=guest-$(key "$here/build.sh" "$cache" "$kernels" "$rootfs" "$host")

# shellcheck disable=SC2086
once "$kernels" build_kernels $variants
once "$rootfs" build_rootfs
# shellcheck disable=SC2086
once "$result" write_manifest "$kernels" "$rootfs" $variants
say "ready:$variants"
echo "$cache/$result"
