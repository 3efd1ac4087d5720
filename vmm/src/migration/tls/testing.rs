//! Certificates for tests.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::TlsFiles;

/// An authority.
pub(in crate::migration) struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(in crate::migration) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// The files of a host, trusting `trusted`.
    pub(in crate::migration) fn host(&self, name: &str, trusted: &Self, directory: &Path) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let file = |kind: &str, text: &str| {
            let path = directory.join(format!("{name}.{kind}"));
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        TlsFiles {
            certificate: file("crt", &certificate.pem()),
            key: file("key", &key.serialize_pem()),
            ca: file("ca", &trusted.pem),
        }
    }
}
