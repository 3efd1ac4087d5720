# shellcheck shell=sh
# Compiles the guest kernels. Sourced by build.sh; what is in this file, config/ and
# patches/ decides the cache's key, so nothing else belongs here.

release=6.1
tarball=/usr/src/linux-source-$release.tar.xz

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
    smp) echo base hotplug acpi cmdline-devices emulated ;;
    acpi) echo base hotplug acpi keyboard emulated ;;
    native) echo base hotplug acpi keyboard ;;
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
    say "compiling the kernels$(printf ' %s' "$@"): some 5 minutes on two cores, about 1100 files"
    for variant in "$@"; do
        say "kernel $variant"
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
