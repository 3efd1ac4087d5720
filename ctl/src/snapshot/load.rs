//! `coraclectl snapshot load`: a machine in the foreground, from a snapshot to its exit status.

use clap::{Args, ValueEnum};
use coracle_vmm::config::Disks;
use serde_json::{Map, Value, json};

use super::keys::ReadingArgs;
use super::memory_path;
use crate::client::LONG_REQUEST_WAIT;
use crate::here::HereArgs;
use crate::output::Format;
use crate::run::{ForegroundArgs, RunError, Step, foreground};

/// Go on from a snapshot in the foreground: show the machine's console, end with its status
///
/// Its disks have to be as they were when the snapshot was made, so a snapshot with writable disks is gone on from once, unless
/// they stay as they are: `--clone`, `--detached`. With `--detached`, `--disk` says where one is now, or which other there is.
/// Console, signals and exit status are as with `run`.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// The state file: a path, or nfs://HOST/EXPORT/FILE; or the directory of a snapshot that includes its disks
    state: String,
    /// The memory file: a path, or nfs://HOST/EXPORT/FILE; that in the directory if absent
    memory: Option<String>,
    /// What is checked of the memory
    #[arg(long, value_enum, value_name = "WHAT", default_value = "lazy")]
    verify: VerifyMode,
    /// Leave the disks as they are, and write to temporary overlays over them: so many machines at a time go on from one snapshot
    #[arg(long, conflicts_with = "detached")]
    clone: bool,
    /// The same, even if the disks have been written since: what the guest remembers of them may not be so any more
    #[arg(long)]
    detached: bool,
    #[command(flatten)]
    here: HereArgs,
    #[command(flatten)]
    keys: ReadingArgs,
    #[command(flatten)]
    options: LoadOptions,
    #[command(flatten)]
    foreground: ForegroundArgs,
}

/// What may be said of any load.
#[derive(Debug, Args)]
pub(crate) struct LoadOptions {
    /// Where overlays lie that are made over the disks, without a name: a directory; in memory if absent
    #[arg(long, value_name = "DIRECTORY")]
    overlay_directory: Option<String>,
    /// Record the pages that the guest writes, for diff snapshots
    #[arg(long)]
    track_dirty_pages: bool,
    /// Load it, and leave the guest paused until `coraclectl resume`
    #[arg(long)]
    paused: bool,
}

/// One load.
#[derive(Clone, Debug)]
pub(crate) struct Load<'a> {
    /// The state file.
    pub(crate) state: &'a str,
    /// The memory file.
    pub(crate) memory: String,
    /// What is checked of it.
    pub(crate) verify: VerifyMode,
    /// How the disks are gone on with.
    pub(crate) disks: Disks,
    /// What is elsewhere now, if something was said of that.
    pub(crate) here: Option<&'a HereArgs>,
    /// What it is read with, if something was said of that.
    pub(crate) keys: Option<&'a ReadingArgs>,
    /// What else was said.
    pub(crate) options: &'a LoadOptions,
}

/// What is checked of a memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerifyMode {
    /// Each part as it is loaded, before the guest sees it
    Lazy,
    /// Nothing: the file is mapped as it is. Only for one that nobody else can change
    Off,
}

/// Runs it.
///
/// # Errors
///
/// As `coraclectl run`.
pub(super) fn load(args: &LoadArgs, format: Format) -> Result<u8, RunError> {
    foreground(&args.foreground, &[], &asked(args).step(), format)
}

fn asked(args: &LoadArgs) -> Load<'_> {
    Load {
        state: &args.state,
        memory: memory_path(&args.state, args.memory.as_ref()),
        verify: args.verify,
        disks: match (args.clone, args.detached) {
            (false, false) => Disks::Continue,
            (true, _) => Disks::Clone,
            (_, true) => Disks::Detached,
        },
        here: Some(&args.here),
        keys: Some(&args.keys),
        options: &args.options,
    }
}

impl Load<'_> {
    /// The request that has a fresh monitor do it.
    pub(crate) fn step(&self) -> Step {
        let mut body = Map::new();
        let mut put = |name: &str, value: Value| drop(body.insert(name.to_owned(), value));
        put("snapshot_path", self.state.into());
        put(
            "mem_backend",
            json!({ "backend_type": "File", "backend_path": self.memory }),
        );
        put("resume_vm", (!self.options.paused).into());
        if self.disks != Disks::Continue {
            put("disks", json!(self.disks));
        }
        if let Some(directory) = &self.options.overlay_directory {
            put("overlay_directory", directory.as_str().into());
        }
        if self.options.track_dirty_pages {
            put("track_dirty_pages", true.into());
        }
        if self.verify == VerifyMode::Off {
            put("verify", "off".into());
        }
        for (part, value) in self.here.into_iter().flat_map(HereArgs::overrides) {
            put(part.of_load(), value);
        }
        if let Some(path) = self.keys.and_then(|keys| keys.trusted_keys.as_ref()) {
            put("trusted_keys", json!(path));
        }
        if let Some(place) = self.keys.and_then(|keys| keys.encryption_key.as_ref()) {
            put("encryption_key", json!(place));
        }
        Step {
            part: "load the snapshot".to_owned(),
            path: "/snapshot/load".to_owned(),
            body: Value::Object(body),
            wait: LONG_REQUEST_WAIT,
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use clap::Parser;
    use coracle_vmm::config::{KeyPlace, SnapshotLoad};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        load: LoadArgs,
    }

    #[test]
    fn the_body_is_one_that_the_monitor_takes() {
        for flags in [
            "",
            " --verify off --track-dirty-pages --paused --name a --trusted-keys t --encryption-key fd:7",
        ] {
            let line = format!("load /s /m{flags}");
            let load = Line::parse_from(line.split(' ')).load;
            let body: SnapshotLoad = serde_json::from_value(asked(&load).step().body).unwrap();
            assert_eq!(body.memory().unwrap().0, "/m");
            let is_plain = flags.is_empty();
            assert_eq!((body.resume_vm, body.track_dirty_pages), (is_plain, !is_plain));
            assert_eq!(body.trusted_keys, (!is_plain).then(|| "t".into()));
            assert_eq!(body.encryption_key, (!is_plain).then_some(KeyPlace::Fd(7)));
            assert_eq!(body.disks, Disks::Continue);
        }
    }

    #[test]
    fn what_is_elsewhere_is_said_as_the_monitor_takes_it() {
        let line = "load /s /m --disk d=nfs://nas/d --disk e=/e --net eth0=tap7 --vsock /v";
        let load = Line::parse_from(line.split(' ')).load;
        let body: SnapshotLoad = serde_json::from_value(asked(&load).step().body).unwrap();
        let drives: Vec<_> = body
            .drive_overrides
            .iter()
            .map(|given| (given.drive_id.as_str(), given.path_on_host.as_deref()))
            .collect();
        assert_eq!(drives, [("d", Some("nfs://nas/d")), ("e", Some("/e"))]);
        assert_eq!(body.network_overrides.first().unwrap().host_dev_name, "tap7");
        assert_eq!(body.vsock_override.unwrap().uds_path, "/v");
        for wrong in ["d", "=x", "d="] {
            let words = ["load", "/s", "/m", "--disk", wrong];
            assert!(Line::try_parse_from(words).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_directory_has_its_memory_and_disks_are_gone_on_with_as_was_said() {
        for (flag, disks) in [("--clone", Disks::Clone), ("--detached", Disks::Detached)] {
            let line = format!("load /s {flag} --overlay-directory /t");
            let load = Line::parse_from(line.split(' ')).load;
            let body: SnapshotLoad = serde_json::from_value(asked(&load).step().body).unwrap();
            assert_eq!(body.memory().unwrap().0, "/s/memory");
            assert_eq!(
                (body.disks, body.overlay_directory.as_deref()),
                (disks, Some("/t"))
            );
        }
        assert!(Line::try_parse_from(["load", "/s", "--clone", "--detached"]).is_err());
    }
}
