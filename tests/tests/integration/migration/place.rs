//! Where the disk of a guest is that is moved.

use std::path::{Path, PathBuf};

use coracle_tests::Outcome;
use coracle_tests::guest::blank_image;
use coracle_tests::harness::nfs::server::{Plan, Server};
use serde_json::{Value, json};

/// A blank disk, and the server that it may be on.
pub(super) enum Place {
    File(PathBuf),
    Nfs(Box<Server>),
}

impl Place {
    /// All kinds.
    pub(super) const KINDS: &[&'static str] = &["a file", "NFS"];
    /// Those that are on a server.
    pub(super) const SERVED: &[&'static str] = &["NFS"];

    /// A disk of that kind and size.
    pub(super) fn new(kind: &str, directory: &Path, mib: u64) -> Outcome<Self> {
        match kind {
            "a file" => {
                let path = directory.join("test-disk");
                blank_image(&path, mib)?;
                Ok(Self::File(path))
            }
            "NFS" => Ok(Self::Nfs(Box::new(Server::start(Plan::image(mib << 20))?))),
            _ => Err(format!("no disk is on {kind}").into()),
        }
    }

    /// What a drive calls it.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::File(path) => path.clone(),
            Self::Nfs(server) => PathBuf::from(server.url("export/image.raw")),
        }
    }

    /// A drive `id` of it, with a cache.
    pub(super) fn drive(&self, id: &str) -> Value {
        json!({
            "drive_id": id, "path_on_host": self.path(), "is_root_device": false, "is_read_only": false,
            "cache_type": "Writeback"
        })
    }

    /// Has the server, if there is one, die and begin anew.
    pub(super) fn restart(&mut self) -> Outcome {
        match self {
            Self::File(_) => Ok(()),
            Self::Nfs(server) => {
                server.kill()?;
                server.restart()
            }
        }
    }
}
