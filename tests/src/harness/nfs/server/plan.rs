//! What a server is to be: its exports, the versions it speaks, its patience with clients that are gone.

use std::net::SocketAddr;
use std::path::Path;

/// What a server is to be. It exports nothing until it is given something.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(super) exports: Vec<Export>,
    pub(super) minor_versions: Vec<u32>,
    pub(super) has_v3: bool,
    lease_seconds: u32,
    grace_seconds: u32,
}

/// One export: a directory of its own, empty when the server starts for the first time but for its images.
#[derive(Clone, Debug)]
pub struct Export {
    pub(super) path: String,
    /// Names and lengths.
    pub(super) images: Vec<(String, u64)>,
    is_read_only: bool,
    squash: Squash,
}

/// Whom the server takes a client's users for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Squash {
    /// For whom they say they are.
    #[default]
    None,
    /// Root for nobody.
    Root,
    /// All for nobody.
    All,
}

/// User and group of nobody.
const NOBODY: u32 = 65_534;
/// The shortest that leaves a client the time to come back.
const SHORT_SECONDS: u32 = 5;
/// What is read or written at once, at most and by preference.
const TRANSFER_BYTES: u32 = 1 << 20;

impl Default for Plan {
    fn default() -> Self {
        Self {
            exports: vec![],
            minor_versions: vec![0, 1, 2],
            has_v3: false,
            lease_seconds: SHORT_SECONDS,
            grace_seconds: SHORT_SECONDS,
        }
    }
}

impl Plan {
    /// With one writable export `/export`, in it `image.raw`, blank and of so many bytes.
    pub fn image(bytes: u64) -> Self {
        Self::default().export(Export::new("export").image("image.raw", bytes))
    }

    /// With one more export.
    #[must_use]
    pub fn export(mut self, export: Export) -> Self {
        self.exports.push(export);
        self
    }

    /// A lease lasts so many seconds from its last renewal.
    #[must_use]
    pub fn lease_seconds(mut self, seconds: u32) -> Self {
        self.lease_seconds = seconds;
        self
    }

    /// After a restart clients have so many seconds to reclaim; with nobody who could, there is no grace at all.
    #[must_use]
    pub fn grace_seconds(mut self, seconds: u32) -> Self {
        self.grace_seconds = seconds;
        self
    }

    /// Of NFSv4 the server speaks these minor versions only; with none, no NFSv4.
    #[must_use]
    pub fn minor_versions(mut self, versions: &[u32]) -> Self {
        self.minor_versions = versions.to_vec();
        self
    }

    /// NFSv3 as well, with an rpcbind: this needs a host of its own ([`super::Server::start_on`]).
    #[must_use]
    pub fn with_v3(mut self) -> Self {
        self.has_v3 = true;
        self
    }

    /// The server's configuration, with all that it keeps in this directory.
    pub(super) fn configuration(&self, directory: &Path, address: SocketAddr) -> String {
        let protocols = match (self.has_v3, self.minor_versions.is_empty()) {
            (true, true) => "3",
            (true, false) => "3, 4",
            (false, _) => "4",
        };
        let exports = (1..).zip(&self.exports);
        let exports = exports.map(|(number, export)| export.configuration(number, directory, protocols));
        [self.core(address, protocols), self.version_4(directory)]
            .into_iter()
            .chain(exports)
            .collect()
    }

    fn core(&self, address: SocketAddr, protocols: &str) -> String {
        let (listen, port, has_v3) = (address.ip(), address.port(), self.has_v3);
        let [mount_port, lock_port] = [super::mount_port(port), super::mount_port(port) + 1];
        format!(
            "NFS_CORE_PARAM {{ Protocols = {protocols}; NFS_Port = {port}; Bind_addr = {listen}; \
             MNT_Port = {mount_port}; mount_path_pseudo = true; Enable_NLM = {has_v3}; NLM_Port = {lock_port}; \
             Enable_RQUOTA = false; Enable_UDP = false; }}\n\
             NFS_KRB5 {{ Active_krb5 = false; }}\n"
        )
    }

    fn version_4(&self, directory: &Path) -> String {
        let records = directory.join("recovery");
        let (records, lease, grace) = (records.display(), self.lease_seconds, self.grace_seconds);
        let minor_versions: Vec<String> = self.minor_versions.iter().map(u32::to_string).collect();
        let minor_versions = match minor_versions.as_slice() {
            [] => String::new(),
            some => format!("Minor_Versions = {};", some.join(", ")),
        };
        format!(
            "NFSv4 {{ {minor_versions} Lease_Lifetime = {lease}; Grace_Period = {grace}; Delegations = false; \
             Only_Numeric_Owners = true; RecoveryBackend = fs; RecoveryRoot = \"{records}\"; }}\n"
        )
    }
}

impl Export {
    /// A writable export at a path below the root, where users are who they say.
    pub fn new(path: &str) -> Self {
        Self {
            path: path.to_owned(),
            images: vec![],
            is_read_only: false,
            squash: Squash::default(),
        }
    }

    /// With a blank file of so many bytes in it.
    #[must_use]
    pub fn image(mut self, name: &str, bytes: u64) -> Self {
        self.images.push((name.to_owned(), bytes));
        self
    }

    /// The server writes nothing there.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.is_read_only = true;
        self
    }

    /// With users that are taken for others.
    #[must_use]
    pub fn squash(mut self, squash: Squash) -> Self {
        self.squash = squash;
        self
    }

    fn configuration(&self, number: u32, directory: &Path, protocols: &str) -> String {
        let (directory, path) = (directory.display(), &self.path);
        let access = if self.is_read_only { "RO" } else { "RW" };
        let squash = match self.squash {
            Squash::None => "No_Root_Squash",
            Squash::Root => "Root_Squash",
            Squash::All => "All_Squash",
        };
        let most = TRANSFER_BYTES;
        // What a judge changes from outside is seen at once: no attribute is kept.
        format!(
            "EXPORT {{ Export_Id = {number}; Path = \"{directory}/exports/{path}\"; Pseudo = \"/{path}\"; \
             Protocols = {protocols}; Transports = TCP; SecType = sys; Access_Type = {access}; \
             Squash = {squash}; Anonymous_Uid = {NOBODY}; Anonymous_Gid = {NOBODY}; Attr_Expiration_Time = 0; \
             MaxRead = {most}; MaxWrite = {most}; PrefRead = {most}; PrefWrite = {most}; FSAL {{ Name = VFS; }} }}\n"
        )
    }
}
