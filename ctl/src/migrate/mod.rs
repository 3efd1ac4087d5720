//! `coraclectl migrate`, `receive` and `certs`: machines that go from one process to another while their guests run.

mod certs;
mod receive;
mod receiver;
mod send;

use std::convert::Infallible;
use std::path::{Path, PathBuf, absolute};
use std::str::FromStr;

use serde_json::{Value, json};
use thiserror::Error;

use crate::client::ClientError;
use crate::discovery::FindError;
use crate::output::OutputError;
use crate::signals::SignalsError;

pub(crate) use self::certs::{CertsArgs, certs};
pub(crate) use self::receive::{ReceiveArgs, receive};
use self::receiver::ReceiverError;
pub(crate) use self::send::{MigrateArgs, migrate};

/// Why a machine was not sent.
#[derive(Debug, Error)]
pub(crate) enum MigrateError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Receiver(#[from] ReceiverError),
    #[error("`{0}` is no receiver: give it as HOST:PORT or tls://HOST:PORT")]
    To(String),
    #[error(
        "--disk, --net and --vsock are for a receiver that --here starts; another one is told itself: coraclectl receive --help"
    )]
    NotHere,
    #[error("no migration of `{0}` is under way")]
    None(String),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Signals(#[from] SignalsError),
    #[error("cannot watch the migration")]
    Watch(#[from] std::io::Error),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// The directory with the certificates of this host.
#[derive(Clone, Debug)]
pub(crate) struct CertsDirectory(PathBuf);

impl FromStr for CertsDirectory {
    type Err = Infallible;

    fn from_str(path: &str) -> Result<Self, Infallible> {
        Ok(Self(path.into()))
    }
}

/// What the directory of one host has.
const CERTIFICATE: &str = "host.crt";
const KEY: &str = "host.key";
const CA: &str = "ca.crt";

impl CertsDirectory {
    fn path(&self) -> &Path {
        &self.0
    }

    /// As the monitor takes it, which may have another working directory.
    fn tls(&self) -> std::io::Result<Value> {
        let directory = absolute(&self.0)?;
        let file = |name: &str| directory.join(name).to_string_lossy().into_owned();
        Ok(json!({ "certificate": file(CERTIFICATE), "key": file(KEY), "ca": file(CA) }))
    }
}
