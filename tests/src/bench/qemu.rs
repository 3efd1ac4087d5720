//! QEMU's microvm as the benchmarks compare with it: as little of it as the guest needs.

use std::path::Path;

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// The command line of a machine with the guest's serial port on standard output, and no disk yet.
///
/// QEMU sets the MSR of architectural capabilities on start, which hosts that emulate KVM refuse; the guest has
/// no use for it.
pub fn microvm(memory_mib: u64, guest: &Path, boot_args: &str) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "-M",
        "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off",
        "-enable-kvm",
        "-cpu",
        "host,-arch-capabilities",
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        "-no-reboot",
        "-serial",
        "stdio",
    ]
    .map(str::to_owned)
    .into();
    arguments.extend(["-m".to_owned(), format!("{memory_mib}M"), "-kernel".to_owned()]);
    arguments.extend([
        guest.display().to_string(),
        "-append".to_owned(),
        boot_args.to_owned(),
    ]);
    arguments
}
