//! `coraclectl certs`: an authority and its hosts, for people who have none.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;
use thiserror::Error;

use super::{CA, CERTIFICATE, KEY};
use crate::output::{Format, OutputError, print, print_json};

/// Make certificates for hosts that send machines to each other
#[derive(Debug, Args)]
pub(crate) struct CertsArgs {
    #[command(subcommand)]
    verb: CertsVerb,
}

#[derive(Debug, Subcommand)]
enum CertsVerb {
    Init(InitArgs),
}

/// Make an authority, unless there is one, and a certificate for each host
///
/// DIR gets ca.crt and ca.key, and a directory for each host, to be copied there and named by `--certs`. Whoever has ca.key can
/// make hosts that are trusted: keep it where none of the hosts is.
#[derive(Debug, Args)]
struct InitArgs {
    /// Where everything goes
    dir: PathBuf,
    /// A host, by the name or address that others reach it by
    #[arg(required = true, value_name = "HOST")]
    hosts: Vec<String>,
}

/// Why there are no certificates.
#[derive(Debug, Error)]
pub(crate) enum CertsError {
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is there already, and stays as it is: to make the host a new certificate, remove that directory first",
        .0.display()
    )]
    Exists(PathBuf),
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{0}` is no name of a host that a directory can have")]
    Host(String),
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// The file of the authority's key.
const CA_KEY: &str = "ca.key";

/// Carries it out.
///
/// # Errors
///
/// What could not be made; a host that has its files keeps them.
pub(crate) fn certs(args: &CertsArgs, format: Format) -> Result<(), CertsError> {
    let CertsVerb::Init(args) = &args.verb;
    let is_plain = |host: &str| !host.is_empty() && !host.starts_with('.') && !host.contains('/');
    if let Some(host) = args.hosts.iter().find(|host| !is_plain(host)) {
        return Err(CertsError::Host(host.clone()));
    }
    make_directory(&args.dir)?;
    let (issuer, ca) = authority(&args.dir)?;
    for host in &args.hosts {
        let directory = args.dir.join(host);
        if directory.join(KEY).exists() {
            return Err(CertsError::Exists(directory));
        }
        make_directory(&directory)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![host.clone()])?;
        params.distinguished_name.push(DnType::CommonName, host.as_str());
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &issuer)?;
        write_new(&directory.join(KEY), &key.serialize_pem(), PRIVATE)?;
        write_new(&directory.join(CERTIFICATE), &certificate.pem(), PUBLIC)?;
        write_new(&directory.join(CA), &ca, PUBLIC)?;
    }
    let dir = args.dir.display().to_string();
    match format {
        Format::Json => print_json(&json!({ "dir": dir, "hosts": args.hosts }))?,
        Format::Text => {
            for host in &args.hosts {
                print(format_args!(
                    "{dir}/{host}: copy it to {host}, and name it there by --certs\n"
                ))?;
            }
        }
    }
    Ok(())
}

/// That of `dir`, or a new one, and its certificate.
fn authority(dir: &Path) -> Result<(Issuer<'static, KeyPair>, String), CertsError> {
    let (key_path, path) = (dir.join(CA_KEY), dir.join(CA));
    if key_path.exists() {
        let ca = read(&path)?;
        let key = KeyPair::from_pem(&read(&key_path)?)?;
        return Ok((Issuer::new(ca_params()?, key), ca));
    }
    let key = KeyPair::generate()?;
    let params = ca_params()?;
    let ca = params.self_signed(&key)?.pem();
    write_new(&key_path, &key.serialize_pem(), PRIVATE)?;
    write_new(&path, &ca, PUBLIC)?;
    Ok((Issuer::new(params, key), ca))
}

/// What an authority is, whoever asks: hosts name it by this.
fn ca_params() -> Result<CertificateParams, CertsError> {
    let mut params = CertificateParams::new(Vec::new())?;
    params
        .distinguished_name
        .push(DnType::CommonName, "Coracle migration CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

const PRIVATE: u32 = 0o600;
const PUBLIC: u32 = 0o644;

fn make_directory(path: &Path) -> Result<(), CertsError> {
    fs::create_dir_all(path).map_err(|source| CertsError::Write {
        path: path.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<String, CertsError> {
    fs::read_to_string(path).map_err(|source| CertsError::Read {
        path: path.to_owned(),
        source,
    })
}

/// A file that was not there before.
fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), CertsError> {
    let mut options = OpenOptions::new();
    let opened = options.write(true).create_new(true).mode(mode).open(path);
    let written = opened.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| CertsError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use coracle_vmm::migration::tls::{Identity, TlsFiles};

    use super::*;

    fn init(dir: &Path, hosts: &[&str]) -> Result<(), CertsError> {
        let verb = CertsVerb::Init(InitArgs {
            dir: dir.to_owned(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
        });
        certs(&CertsArgs { verb }, Format::Json)
    }

    #[test]
    fn hosts_that_are_made_one_after_the_other_trust_each_other() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), &["127.0.0.1"]).unwrap();
        init(directory.path(), &["host-b"]).unwrap();
        let identity = |host: &str| {
            let file = |name: &str| directory.path().join(host).join(name).display().to_string();
            let files = TlsFiles {
                certificate: file(CERTIFICATE),
                key: file(KEY),
                ca: file(CA),
            };
            Identity::read(&files).unwrap()
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let listening = std::thread::spawn({
            let a = identity("127.0.0.1");
            move || a.accept(listener.accept().unwrap().0, Some("host-b")).map(drop)
        });
        let socket = std::net::TcpStream::connect(address).unwrap();
        let called = identity("host-b").call(socket, "127.0.0.1").map(drop);
        called.unwrap();
        listening.join().unwrap().unwrap();
    }

    #[test]
    fn keys_are_for_their_owner_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), &["a"]).unwrap();
        for key in ["ca.key", "a/host.key"] {
            let mode = fs::metadata(directory.path().join(key))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        assert!(matches!(
            init(directory.path(), &["a"]),
            Err(CertsError::Exists(_))
        ));
        assert!(matches!(
            init(directory.path(), &["../b"]),
            Err(CertsError::Host(_))
        ));
    }
}
