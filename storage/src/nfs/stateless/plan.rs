//! What was asked for, parsed and resolved: all that one connection after the other of an image is made from.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::nfs::plan::User;
use crate::nfs::rpc::Credential;
use crate::nfs::url::Path;

/// A file on a server, as it was asked for.
#[derive(Debug)]
pub(in crate::nfs) struct Plan {
    /// Its URL, for messages.
    pub(in crate::nfs) name: String,
    /// The server's addresses, in the order in which they are tried. Their ports are of no meaning.
    pub(in crate::nfs) servers: Vec<SocketAddr>,
    /// Where NFS is, if that was said.
    pub(in crate::nfs) port: Option<u16>,
    /// Where MOUNT is, if that was said.
    pub(in crate::nfs) mount_port: Option<u16>,
    pub(in crate::nfs) path: Path,
    /// As whom.
    pub(in crate::nfs) user: User,
    pub(in crate::nfs) credential: Arc<Credential>,
    /// How long a request waits for the server before it fails; for ever if nothing is said.
    pub(in crate::nfs) report_after: Option<Duration>,
}
