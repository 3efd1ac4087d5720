//! The guests that the tests boot, as configuration of the machine around them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

use crate::Outcome;
use crate::environment::Environment;
use crate::monitor::{Ended, Launch};

/// A machine to be, in the form of a configuration file.
#[derive(Clone, Debug)]
pub struct Machine {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    boot_args: String,
    vcpus: u32,
    memory_mib: u32,
    drives: Vec<Value>,
    parts: Map<String, Value>,
}

impl Machine {
    /// A machine with this kernel, one vCPU and 128 MiB.
    pub fn new(kernel: &Path, boot_args: &str) -> Self {
        let kernel = kernel.to_owned();
        let boot_args = boot_args.to_owned();
        Self {
            kernel,
            initrd: None,
            boot_args,
            vcpus: 1,
            memory_mib: 128,
            drives: vec![],
            parts: Map::new(),
        }
    }

    /// The unikernel guest, which does the words of its command line in order.
    pub fn unikernel(environment: &Environment, words: &str) -> Self {
        Self::new(&environment.unikernel, &unikernel_words(words))
    }

    /// With an initial RAM disk.
    #[must_use]
    pub fn initrd(mut self, path: &Path) -> Self {
        self.initrd = Some(path.to_owned());
        self
    }

    /// With so many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, count: u32) -> Self {
        self.vcpus = count;
        self
    }

    /// With so much memory.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// With one more disk, which is writable and no root.
    #[must_use]
    pub fn disk(self, id: &str, path: &Path) -> Self {
        self.drive(json!({
            "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": false
        }))
    }

    /// With one more drive, as the API has it.
    #[must_use]
    pub fn drive(mut self, drive: Value) -> Self {
        self.drives.push(drive);
        self
    }

    /// With every root drive read-only.
    #[must_use]
    pub fn read_only_root(self) -> Self {
        self.root("is_read_only", &Value::Bool(true))
    }

    /// With this member in every root drive.
    #[must_use]
    pub fn root(mut self, member: &str, value: &Value) -> Self {
        for drive in self.drives.iter_mut().filter_map(Value::as_object_mut) {
            if drive.get("is_root_device") == Some(&Value::Bool(true)) {
                drive.insert(member.into(), value.clone());
            }
        }
        self
    }

    /// With another part of the configuration.
    #[must_use]
    pub fn part(mut self, name: &str, content: Value) -> Self {
        self.parts.insert(name.to_owned(), content);
        self
    }

    /// The configuration file's content; each member is also the body of one PUT.
    pub fn config(&self) -> Value {
        let mut boot = json!({ "kernel_image_path": self.kernel, "boot_args": self.boot_args });
        if let (Some(initrd), Some(boot)) = (&self.initrd, boot.as_object_mut()) {
            boot.insert("initrd_path".into(), json!(initrd));
        }
        let mut config = self.parts.clone();
        config.insert("boot-source".into(), boot);
        config.insert(
            "machine-config".into(),
            json!({ "vcpu_count": self.vcpus, "mem_size_mib": self.memory_mib }),
        );
        config.insert("drives".into(), Value::Array(self.drives.clone()));
        Value::Object(config)
    }
}

/// Runs a machine from a configuration file to its end, without an API.
///
/// # Errors
///
/// When it does not start, or does not end in time.
pub fn run(launch: Launch, machine: &Machine, limit: Duration) -> Outcome<Ended> {
    launch
        .without_api()
        .config(&machine.config())?
        .spawn()?
        .wait(limit)
}

/// The Linux guest's manifest, which its build script writes.
#[derive(Clone, Debug, Deserialize)]
pub struct Linux {
    /// `emulating` or `native`: what kind of host it is.
    pub host: String,
    /// The variant for this host.
    pub run: String,
    /// The root filesystem: shared, so it is copied before a guest writes to it.
    pub rootfs: PathBuf,
    kernels: BTreeMap<String, Kernel>,
}

/// One variant of the kernel.
#[derive(Clone, Debug, Deserialize)]
pub struct Kernel {
    /// The ELF file, with a PVH note.
    pub vmlinux: PathBuf,
    /// The same, compressed.
    pub bzimage: PathBuf,
    boot_args: BTreeMap<String, String>,
}

impl Linux {
    /// Reads the manifest.
    ///
    /// # Errors
    ///
    /// When the guest was not built.
    pub fn read(environment: &Environment) -> Outcome<Self> {
        let path = environment.linux.join("manifest.json");
        let text = std::fs::read_to_string(&path)
            .map_err(|e| format!("{}: {e}; run: make linux", path.display()))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// A machine with this variant of the kernel, a private copy of the root filesystem in `directory`, and
    /// work for its init.
    ///
    /// # Errors
    ///
    /// When the variant is not in the manifest, or the copy fails.
    pub fn machine(&self, variant: &str, directory: &Path, words: &str) -> Outcome<Machine> {
        let kernel = self
            .kernels
            .get(variant)
            .ok_or_else(|| format!("no kernel '{variant}' in the manifest"))?;
        self.machine_with(&kernel.vmlinux, kernel, directory, words)
    }

    /// The same with the compressed kernel.
    ///
    /// # Errors
    ///
    /// As for [`Linux::machine`].
    pub fn compressed_machine(&self, variant: &str, directory: &Path, words: &str) -> Outcome<Machine> {
        let kernel = self
            .kernels
            .get(variant)
            .ok_or_else(|| format!("no kernel '{variant}' in the manifest"))?;
        self.machine_with(&kernel.bzimage, kernel, directory, words)
    }

    fn machine_with(&self, image: &Path, kernel: &Kernel, directory: &Path, words: &str) -> Outcome<Machine> {
        let root = directory.join("test-root.ext4");
        if !root.exists() {
            copy_image(&self.rootfs, &root)?;
        }
        let template = cpu_template(&self.host);
        let key = if self.host == "emulating" && template.is_none() {
            "emulating_without_template"
        } else {
            &self.host
        };
        let arguments = kernel
            .boot_args
            .get(key)
            .ok_or_else(|| format!("no boot_args for '{key}'"))?;
        let machine = Machine::new(image, &format!("{arguments} -- {words}")).drive(json!({
            "drive_id": "rootfs", "path_on_host": root, "is_root_device": true, "is_read_only": false
        }));
        Ok(match template {
            Some(template) => machine.part("cpu-config", template),
            None => machine,
        })
    }
}

/// The CPU template that a host needs, if any; `CORACLE_NO_CPU_TEMPLATE` is for monitors that cannot drop leaves.
fn cpu_template(host: &str) -> Option<Value> {
    if host != "emulating" || std::env::var_os("CORACLE_NO_CPU_TEMPLATE").is_some() {
        return None;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/cpu-templates/emulating-host.json");
    serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
}

/// A private copy of an image, sparse, and sharing blocks where the filesystem can.
///
/// # Errors
///
/// When it cannot be copied.
pub fn copy_image(from: &Path, to: &Path) -> Outcome {
    // It belongs to whoever makes it, and in a run in jails that is not whom `cp` runs as.
    std::fs::File::create(to)?;
    let copied = Command::new("cp")
        .args(["--reflink=auto", "--sparse=always"])
        .arg(from)
        .arg(to)
        .output()?;
    crate::ensure!(
        copied.status.success(),
        "{}",
        String::from_utf8_lossy(&copied.stderr)
    );
    // The original is read-only so that nobody writes to it by mistake.
    let mut permissions = std::fs::metadata(to)?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
    Ok(std::fs::set_permissions(to, permissions)?)
}

/// A sparse image of zeroes.
///
/// # Errors
///
/// When it cannot be made.
pub fn blank_image(path: &Path, mib: u64) -> Outcome {
    Ok(std::fs::File::create(path)?.set_len(mib << 20)?)
}

/// The unikernel guest's command line: the words, and what it cannot find out by itself.
pub fn unikernel_words(words: &str) -> String {
    tsc_khz().map_or_else(|| words.to_owned(), |khz| format!("{words} tsc_khz={khz}"))
}

/// The frequency of the TSC, where the guest cannot read it from CPUID.
fn tsc_khz() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let mhz = info.lines().find_map(|line| {
        line.strip_prefix("cpu MHz")?
            .split_once(':')?
            .1
            .trim()
            .parse::<f64>()
            .ok()
    })?;
    // The figure of /proc/cpuinfo has three decimals: kHz.
    format!("{:.0}", mhz * 1000.0).parse().ok()
}
