//! Compiles the policy of system calls to what the kernel takes.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

#[path = "src/seccomp/policy.rs"]
mod policy;

const POLICY: &str = "../resources/seccomp/x86_64.json";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={POLICY}");
    println!("cargo::rerun-if-changed=src/seccomp/policy.rs");
    let programs = policy::compile(&fs::read_to_string(POLICY)?)?;
    let mut text = String::from("&[\n");
    for (kind, program) in &programs {
        writeln!(text, "    ({kind:?}, &[")?;
        for line in program {
            let (code, jt, jf, k) = (line.code, line.jt, line.jf, line.k);
            writeln!(
                text,
                "        libc::sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},"
            )?;
        }
        writeln!(text, "    ]),")?;
    }
    text.push_str("]\n");
    fs::write(Path::new(&env::var("OUT_DIR")?).join("seccomp.rs"), text)?;
    Ok(())
}
