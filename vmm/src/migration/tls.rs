//! The connection of a migration: TLS 1.3, and both sides show certificates and check each other's chain and name.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, ConnectionCommon, RootCertStore, ServerConfig,
    ServerConnection, SideData, StreamOwned,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The certificates of one side: files in PEM, which are read for each migration. A descriptor that was handed to the process is
/// `/dev/fd/N`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificate of this host, and those between it and the authority.
    pub certificate: String,
    /// Its private key, in PKCS#8.
    pub key: String,
    /// The certificates of the authorities whose hosts are trusted.
    pub ca: String,
}

/// Why there is no connection that can be trusted.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// The file.
        path: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Or is no PEM.
    #[error("`{path}` holds no {what} in PEM")]
    Pem {
        /// The file.
        path: String,
        /// What was looked for.
        what: &'static str,
        /// What was found.
        #[source]
        source: Option<pem::Error>,
    },
    /// Or holds what cannot be used.
    #[error("the certificates cannot be used: {what}")]
    Unusable {
        /// What is wrong.
        what: String,
    },
    /// The name of the other side is none.
    #[error("`{name}` is no name and no address of a host")]
    Name {
        /// As configured.
        name: String,
        /// What is wrong.
        #[source]
        source: InvalidDnsNameError,
    },
    /// The other side does not prove to be who it should be, or does not take us for whom we say.
    #[error("no connection that can be trusted: one side does not accept the other's certificate")]
    Refused(#[source] io::Error),
    /// The other side says nothing.
    #[error(
        "the other side has not answered the greeting in time: is it busy with another caller, or no receiver?"
    )]
    Silent,
    /// The other side is trusted and has another name.
    #[error(
        "the certificate of the other side is not of `{name}`: if it is that of the right host, say the name that it has \
         (`to_name`, --to-name, where a machine is sent; `from_name`, --from-name, where it is received)"
    )]
    OtherName {
        /// As configured.
        name: String,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
}

/// The side that listens.
pub type ServerStream = StreamOwned<ServerConnection, TcpStream>;
/// The side that calls.
pub type ClientStream = StreamOwned<ClientConnection, TcpStream>;

/// What was read of [`TlsFiles`].
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

impl Identity {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// What cannot be read, by its path.
    pub fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let chain = certificates(&files.certificate)?;
        let wrong = |source| TlsError::Pem {
            path: files.key.clone(),
            what: "private key",
            source: Some(source),
        };
        let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?).map_err(wrong)?;
        let mut roots = RootCertStore::empty();
        for root in certificates(&files.ca)? {
            roots.add(root).map_err(|error| unusable(&error))?;
        }
        Ok(Self {
            chain,
            key,
            roots: Arc::new(roots),
        })
    }

    /// Greets whoever has called, and takes a host of a trusted authority that is `name`, if that is said.
    ///
    /// # Errors
    ///
    /// [`TlsError`].
    pub fn accept(&self, socket: TcpStream, name: Option<&str>) -> Result<ServerStream, TlsError> {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), provider()).build();
        let verifier = verifier.map_err(|error| unusable(&error))?;
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        let mut connection = ServerConnection::new(Arc::new(config)).map_err(|error| unusable(&error))?;
        greet(&mut connection, &socket).map_err(|error| refused(error, name))?;
        if let Some(name) = name {
            check_name(connection.peer_certificates(), name)?;
        }
        Ok(StreamOwned::new(connection, socket))
    }

    /// Greets whom it has called, who has to be `name`.
    ///
    /// # Errors
    ///
    /// [`TlsError`].
    pub fn call(&self, socket: TcpStream, name: &str) -> Result<ClientStream, TlsError> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        let connection = ClientConnection::new(Arc::new(config), host_name(name)?);
        let mut connection = connection.map_err(|error| unusable(&error))?;
        greet(&mut connection, &socket).map_err(|error| refused(error, Some(name)))?;
        Ok(StreamOwned::new(connection, socket))
    }
}

/// How long two sides may take to know each other.
pub const GREETING_MAX: Duration = Duration::from_secs(5);

/// Has `talk` go on by a connection, for no longer than `limit` in all; the socket's own limits are as before then.
///
/// # Errors
///
/// When the socket takes no limits.
pub(super) fn within<T>(
    limit: Duration,
    stream: &mut ServerStream,
    talk: impl FnOnce(&mut rustls::Stream<'_, ServerConnection, Timed<'_>>) -> T,
) -> io::Result<T> {
    let StreamOwned { conn, sock } = stream;
    let (read, write) = (sock.read_timeout()?, sock.write_timeout()?);
    let mut timed = Timed {
        socket: sock,
        until: Instant::now() + limit,
    };
    let outcome = talk(&mut rustls::Stream::new(conn, &mut timed));
    sock.set_read_timeout(read)?;
    sock.set_write_timeout(write)?;
    Ok(outcome)
}

/// Goes through the handshake, whatever the other side makes of its time; the socket's own limits are as before then.
fn greet<S: SideData>(connection: &mut ConnectionCommon<S>, socket: &TcpStream) -> io::Result<()> {
    let (read, write) = (socket.read_timeout()?, socket.write_timeout()?);
    let mut timed = Timed {
        socket,
        until: Instant::now() + GREETING_MAX,
    };
    while connection.is_handshaking() {
        connection.complete_io(&mut timed)?;
    }
    socket.set_read_timeout(read)?;
    socket.set_write_timeout(write)
}

/// A socket that has one limit for all that goes through it.
pub(super) struct Timed<'a> {
    socket: &'a TcpStream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Some(left))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(bytes)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// What it means that a handshake has failed with one who is to be `name`.
fn refused(error: io::Error, name: Option<&str>) -> TlsError {
    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
        return TlsError::Silent;
    }
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    match (cause, name) {
        (
            Some(
                source @ rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                ),
            ),
            Some(name),
        ) => TlsError::OtherName {
            name: name.to_owned(),
            source: source.clone(),
        },
        _ => TlsError::Refused(ended(error)),
    }
}

/// What is said of a connection that ended: that it did, and not what the library has to say of that.
pub(super) fn ended(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::ErrorKind::UnexpectedEof.into(),
        _ => error,
    }
}

/// TLS 1.3 with AES where the processor has instructions for it, which all that run here have.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
        ],
        ..ring::default_provider()
    })
}

fn check_name(certificates: Option<&[CertificateDer<'_>]>, name: &str) -> Result<(), TlsError> {
    let certificate = certificates.and_then(|chain| chain.first());
    let certificate = certificate.ok_or_else(|| TlsError::Unusable {
        what: "the other side has shown none".to_owned(),
    })?;
    let other = |source| TlsError::OtherName {
        name: name.to_owned(),
        source,
    };
    let parsed = ParsedCertificate::try_from(certificate).map_err(other)?;
    verify_server_name(&parsed, &host_name(name)?).map_err(other)
}

fn host_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|source| TlsError::Name {
        name: name.to_owned(),
        source,
    })
}

fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = |source| TlsError::Pem {
        path: path.to_owned(),
        what: "certificate",
        source,
    };
    let text = read(path)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match read {
        Ok(certificates) if certificates.is_empty() => Err(pem(None)),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(pem(Some(error))),
    }
}

fn read(path: &str) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn unusable(error: &dyn std::error::Error) -> TlsError {
    TlsError::Unusable {
        what: crate::api::chain(error),
    }
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
