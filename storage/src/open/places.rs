//! What of this host's file system an image needs: for a process that is to reach nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use crate::backend::Access;
use crate::host::Host;
use crate::iscsi::IscsiUrl;
use crate::lease::Lock;
use crate::nfs::NfsUrl;
use crate::secret::SecretSource;

/// A place in the file system, and what is done there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it is.
    pub path: PathBuf,
    /// For what.
    pub need: Need,
}

/// What is done at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A file or a device is read.
    Read,
    /// A file or a device is read and written.
    Write,
    /// Files of a directory are listed and read.
    List,
    /// Files are made in a directory, and read, written and removed.
    Make,
}

/// What the C library reads to find a host by its name.
const RESOLVER: [&str; 6] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
];

impl Place {
    pub(crate) fn new(path: impl Into<PathBuf>, need: Need) -> Self {
        Self {
            path: path.into(),
            need,
        }
    }
}

/// The places that [`super::open`] needs for the image at `path`, whose records are named after `at` or after the image. Whether
/// they are there is not looked at.
pub fn places(path: &str, access: Access, lock: Lock, at: Option<&str>) -> Vec<Place> {
    let mut places = if IscsiUrl::is_url(path) {
        // A URL that is none is told about where it is opened.
        path.parse().map_or(Vec::new(), |url| of_unit(&url))
    } else if NfsUrl::is_url(path) {
        path.parse()
            .map_or(Vec::new(), |url: NfsUrl| of_host(&url.image.host))
    } else {
        let need = match access {
            Access::ReadOnly => Need::Read,
            Access::ReadWrite => Need::Write,
        };
        let mut places = vec![Place::new(path, need)];
        places.extend(beside(path, lock, at));
        return places;
    };
    places.extend(at.and_then(|at| records(Path::new(at), lock)));
    places
}

/// Where the records of a file are.
pub(crate) fn beside(path: &str, lock: Lock, at: Option<&str>) -> Option<Place> {
    match at {
        Some(at) => records(Path::new(at), lock),
        // Whichever link leads to it, they are in one place. What is not there yet has its name in its directory.
        None => {
            let found = fs::canonicalize(path);
            records(found.as_deref().unwrap_or(Path::new(path)), lock)
        }
    }
}

/// Whoever writes makes records; whoever only reads finds there who does.
fn records(named_after: &Path, lock: Lock) -> Option<Place> {
    let need = match lock {
        Lock::Exclusive => Need::Make,
        Lock::Shared => Need::List,
        Lock::None => return None,
    };
    Some(Place::new(directory_of(named_after), need))
}

fn of_unit(url: &IscsiUrl) -> Vec<Place> {
    let options = &url.options;
    let mutual = options.mutual.as_ref().map(|mutual| &mutual.secret);
    let secrets = options.chap_secret.iter().chain(mutual);
    let mut places: Vec<Place> = secrets
        .filter_map(|secret| match secret {
            SecretSource::File(path) => Some(Place::new(path, Need::Read)),
            SecretSource::Descriptor(_) => None,
        })
        .collect();
    places.extend(url.portals.iter().flat_map(|portal| of_host(&portal.host)));
    places
}

fn of_host(host: &Host) -> Vec<Place> {
    match host {
        Host::V4(_) | Host::V6(_) => Vec::new(),
        Host::Name(_) => RESOLVER.map(|path| Place::new(path, Need::Read)).into(),
    }
}

/// The directory that a file is in.
pub(crate) fn directory_of<P: AsRef<Path> + ?Sized>(path: &P) -> &Path {
    match path.as_ref().parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn named(path: &str, access: Access, lock: Lock, at: Option<&str>) -> Vec<(String, Need)> {
        let places = places(path, access, lock, at);
        let name = |path: PathBuf| path.into_os_string().into_string().unwrap();
        places
            .into_iter()
            .map(|place| (name(place.path), place.need))
            .collect()
    }

    #[test]
    fn a_file_needs_itself_and_the_directory_of_its_records() {
        let found = named("/nowhere/a.raw", Access::ReadWrite, Lock::Exclusive, None);
        let (image, records) = (("/nowhere/a.raw".to_owned(), Need::Write), "/nowhere".to_owned());
        assert_eq!(found, [image.clone(), (records.clone(), Need::Make)]);
        let found = named("/nowhere/a.raw", Access::ReadOnly, Lock::Shared, None);
        assert_eq!(found, [(image.0.clone(), Need::Read), (records, Need::List)]);
        assert_eq!(
            named("/nowhere/a.raw", Access::ReadWrite, Lock::None, None),
            std::slice::from_ref(&image)
        );
        let found = named(
            "/nowhere/a.raw",
            Access::ReadWrite,
            Lock::Exclusive,
            Some("/leases/a"),
        );
        assert_eq!(found, [image, ("/leases".to_owned(), Need::Make)]);
    }

    #[test]
    fn records_are_where_a_link_leads() {
        let folder = tempfile::tempdir().unwrap();
        let (far, link) = (folder.path().join("far"), folder.path().join("link"));
        fs::create_dir(&far).unwrap();
        fs::write(far.join("a.raw"), "").unwrap();
        std::os::unix::fs::symlink(far.join("a.raw"), &link).unwrap();
        let records = beside(link.to_str().unwrap(), Lock::Exclusive, None);
        let far = fs::canonicalize(far).unwrap();
        assert_eq!(records, Some(Place::new(far, Need::Make)));
    }

    #[test]
    fn an_image_of_a_network_needs_its_secrets_and_what_tells_names() {
        let unit = "iscsi://u@192.0.2.1/iqn.2026-01.org.example:a/0?chap_secret_file=/s";
        let found = named(unit, Access::ReadWrite, Lock::Exclusive, None);
        assert_eq!(found, [("/s".to_owned(), Need::Read)]);
        let found = named(
            "nfs://192.0.2.1/e/a",
            Access::ReadWrite,
            Lock::Exclusive,
            Some("/l/a"),
        );
        assert_eq!(found, [("/l".to_owned(), Need::Make)]);
        let found = named("nfs://store/e/a", Access::ReadOnly, Lock::None, None);
        assert_eq!(found.len(), RESOLVER.len());
        assert!(found.contains(&("/etc/hosts".to_owned(), Need::Read)));
        assert_eq!(named("nfs://", Access::ReadOnly, Lock::None, None), []);
    }
}
