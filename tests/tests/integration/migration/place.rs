//! Where the disk of a guest is that is moved.

use std::path::{Path, PathBuf};

use coracle_storage::iscsi::{Operator, Replace};
use coracle_storage::lease::Owner;
use coracle_tests::Outcome;
use coracle_tests::guest::blank_image;
use coracle_tests::harness::iscsi::target::{self, Target};
use coracle_tests::harness::nfs::server::{self, Server};
use serde_json::{Value, json};

/// A blank disk, and the server that it may be on.
pub(super) enum Place {
    File(PathBuf),
    Nfs(Box<Server>),
    Iscsi(Box<Target>),
}

impl Place {
    /// All kinds.
    pub(super) const KINDS: &[&'static str] = &["a file", "NFS", "iSCSI"];

    /// A disk of that kind and size.
    pub(super) fn new(kind: &str, directory: &Path, mib: u64) -> Outcome<Self> {
        match kind {
            "a file" => {
                let path = directory.join("test-disk");
                blank_image(&path, mib)?;
                Ok(Self::File(path))
            }
            "NFS" => Ok(Self::Nfs(Box::new(Server::start(server::Plan::image(
                mib << 20,
            ))?))),
            "iSCSI" => {
                // One more for the tail that has the records.
                let target = Target::start(target::Plan::disk((mib + 1) << 20))?;
                operator(&target.url(1))?.create(Replace::Never)?;
                Ok(Self::Iscsi(Box::new(target)))
            }
            _ => Err(format!("no disk is on {kind}").into()),
        }
    }

    /// What a drive calls it.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::File(path) => path.clone(),
            Self::Nfs(server) => PathBuf::from(server.url("export/image.raw")),
            Self::Iscsi(target) => PathBuf::from(target.url(1)),
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
            Self::Iscsi(target) => {
                target.kill()?;
                target.restart()
            }
        }
    }

    /// Does what an operator does after a machine was killed: a reservation never ends by itself.
    pub(super) fn free(&self) -> Outcome {
        if let Self::Iscsi(target) = self {
            // It may have been given back.
            drop(operator(&target.url(1))?.break_lease());
        }
        Ok(())
    }
}

fn operator(url: &str) -> Outcome<Operator> {
    Ok(Operator::new(url, None, &Owner::of_this_process("test"))?)
}
