//! The connection of a migration: TLS 1.3, and both sides show certificates and check each other's chain and name.

use std::fs;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The certificates of one side: files in PEM, which are read for each migration.
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
    /// The other side is trusted and has another name.
    #[error("the certificate of the other side is not of `{name}`")]
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
        let connection = ServerConnection::new(Arc::new(config)).map_err(|error| unusable(&error))?;
        let mut stream = StreamOwned::new(connection, socket);
        while stream.conn.is_handshaking() {
            stream
                .conn
                .complete_io(&mut stream.sock)
                .map_err(TlsError::Refused)?;
        }
        if let Some(name) = name {
            check_name(stream.conn.peer_certificates(), name)?;
        }
        Ok(stream)
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
        let connection = connection.map_err(|error| unusable(&error))?;
        let mut stream = StreamOwned::new(connection, socket);
        while stream.conn.is_handshaking() {
            stream
                .conn
                .complete_io(&mut stream.sock)
                .map_err(TlsError::Refused)?;
        }
        Ok(stream)
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
mod tests;
