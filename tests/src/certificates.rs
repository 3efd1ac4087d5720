//! An authority and hosts for a test.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use serde_json::{Value, json};

use crate::Outcome;

/// An authority, and where the files of its hosts are.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca: PathBuf,
    directory: PathBuf,
}

impl Authority {
    /// A new one, with its files in `directory`.
    ///
    /// # Errors
    ///
    /// When they cannot be written.
    pub fn new(directory: &Path) -> Outcome<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = directory.join("ca.crt");
        fs::write(&ca, params.self_signed(&key)?.pem())?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            ca,
            directory: directory.to_owned(),
        })
    }

    /// The `tls` of the host `name`.
    ///
    /// # Errors
    ///
    /// When its files cannot be written.
    pub fn host(&self, name: &str) -> Outcome<Value> {
        self.certified(name, CertificateParams::new(vec![name.to_owned()])?)
    }

    /// The same with a certificate whose time is over.
    ///
    /// # Errors
    ///
    /// When its files cannot be written.
    pub fn host_of_the_past(&self, name: &str) -> Outcome<Value> {
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
        self.certified(&format!("{name}-past"), params)
    }

    fn certified(&self, files: &str, params: CertificateParams) -> Outcome<Value> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let file = |kind: &str| self.directory.join(format!("{files}.{kind}"));
        fs::write(file("crt"), certificate.pem())?;
        fs::write(file("key"), key.serialize_pem())?;
        Ok(json!({ "certificate": file("crt"), "key": file("key"), "ca": self.ca }))
    }
}
