//! The link line of the bare-metal program; the host's unit tests keep the ordinary one.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for every build script");
    let script = format!("{directory}/unikernel.ld");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,noexecstack",
        "-Wl,-z,norelro",
        &format!("-Wl,-T,{script}"),
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rerun-if-changed=src/boot.s");
}
