//! The keys of snapshots on a command line: where they are, never what they are.

use std::path::PathBuf;

use clap::Args;
use coracle_vmm::config::KeyPlace;
use coracle_vmm::keys::{KeyError, ReadingKeys};

/// What snapshots are read with.
#[derive(Debug, Args)]
pub(crate) struct ReadingArgs {
    /// Refuse what no key in this file has signed: Ed25519 public keys in PEM, one after the other
    #[arg(long, value_name = "FILE")]
    pub(super) trusted_keys: Option<PathBuf>,
    /// What it was encrypted with: a file, or fd:NUMBER
    #[arg(long, value_name = "KEY")]
    pub(super) encryption_key: Option<KeyPlace>,
}

impl ReadingArgs {
    /// The keys themselves.
    ///
    /// # Errors
    ///
    /// When one of them is none.
    pub(super) fn read(&self) -> Result<ReadingKeys, KeyError> {
        let encryption = self.encryption_key.as_ref().map(Into::into);
        ReadingKeys::read(self.trusted_keys.as_deref(), encryption.as_ref())
    }
}
