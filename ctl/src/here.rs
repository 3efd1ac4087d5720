//! Where on this host the parts of a machine are that was saved, or is sent here.

use clap::Args;
use serde_json::{Value, json};

/// What has another name here.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct HereArgs {
    /// The image of the drive ID by another path or URL on this host; may be given for each
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = named)]
    disks: Vec<(String, String)>,
    /// Another tap on this host, of the network interface ID; may be given for each
    #[arg(long = "net", value_name = "ID=TAP", value_parser = named)]
    nets: Vec<(String, String)>,
    /// Another path on this host for the socket of the vsock device
    #[arg(long, value_name = "PATH")]
    vsock: Option<String>,
}

/// The id of a drive or a network interface, and where it is here.
pub(crate) fn named(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((id, path)) if !id.is_empty() && !path.is_empty() => Ok((id.to_owned(), path.to_owned())),
        _ => Err("say it as ID=PATH or ID=TAP, with the id that the machine has for it"),
    }
}

impl HereArgs {
    /// Whether nothing was said.
    pub(crate) fn is_empty(&self) -> bool {
        self.overrides().next().is_none()
    }

    /// The same as arguments of another command that takes them.
    pub(crate) fn arguments(&self) -> impl Iterator<Item = String> {
        let of = |flag: &'static str, given: &[(String, String)]| {
            let given = given.iter().map(|(id, place)| format!("--{flag}={id}={place}"));
            given.collect::<Vec<_>>()
        };
        let vsock = self.vsock.iter().map(|path| format!("--vsock={path}"));
        let vsock: Vec<_> = vsock.collect();
        [of("disk", &self.disks), of("net", &self.nets), vsock]
            .into_iter()
            .flatten()
    }

    /// What there is to say of its drives, its networks and its socket, as the API has it; nothing of what is where it was.
    pub(crate) fn overrides(&self) -> impl Iterator<Item = (Overridden, Value)> {
        let list = |given: &[(String, String)], [id, place]: [&str; 2]| {
            let given = given.iter().map(|(name, path)| json!({ id: name, place: path }));
            Value::from_iter(given)
        };
        let drives = list(&self.disks, ["drive_id", "path_on_host"]);
        let networks = list(&self.nets, ["iface_id", "host_dev_name"]);
        let vsock = self.vsock.as_ref().map(|path| json!({ "uds_path": path }));
        [
            (Overridden::Drives, (!self.disks.is_empty()).then_some(drives)),
            (Overridden::Networks, (!self.nets.is_empty()).then_some(networks)),
            (Overridden::Vsock, vsock),
        ]
        .into_iter()
        .filter_map(|(part, value)| Some((part, value?)))
    }
}

/// What part of a machine it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overridden {
    /// Its drives: a list.
    Drives,
    /// Its network interfaces: a list.
    Networks,
    /// Its socket device.
    Vsock,
}

impl Overridden {
    /// What it is called in `overrides` of a migration.
    pub(crate) fn of_migration(self) -> &'static str {
        match self {
            Self::Drives => "drives",
            Self::Networks => "networks",
            Self::Vsock => "vsock",
        }
    }

    /// What it is called in a load.
    pub(crate) fn of_load(self) -> &'static str {
        match self {
            Self::Drives => "drive_overrides",
            Self::Networks => "network_overrides",
            Self::Vsock => "vsock_override",
        }
    }
}
