//! Another NFSv4 client than the one under test: libnfs, by its `nfs-cat`.
//!
//! It speaks minor version 0 and opens without denying anything, so it reads beside a holder who denies writing.

use std::process::Command;

use crate::Outcome;
use crate::harness::daemon;
use crate::harness::hosts::Host;

const READ_WITHIN_SECONDS: &str = "60";

/// The content of the file at an `nfs://` URL.
///
/// # Errors
///
/// When the client is not installed, or cannot read it: there is a grace period, for one.
pub fn read(url: &str) -> Outcome<Vec<u8>> {
    finish(url, &command(url)?.output()?)
}

/// The same from another host.
///
/// # Errors
///
/// As for [`read`].
pub fn read_on(host: &Host, url: &str) -> Outcome<Vec<u8>> {
    let mut command = command(url)?;
    finish(url, &host.inside(|| command.output())??)
}

fn command(url: &str) -> Outcome<Command> {
    daemon::expect_installed(&["nfs-cat"])?;
    let mut command = Command::new("timeout");
    command.args([READ_WITHIN_SECONDS, "nfs-cat", &dialect(url)?]);
    Ok(command)
}

fn finish(url: &str, done: &std::process::Output) -> Outcome<Vec<u8>> {
    crate::ensure!(
        done.status.success(),
        "nfs-cat {url}: {}: {}",
        done.status,
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(done.stdout.clone())
}

/// The URL as libnfs wants it: the port is an argument, and so is the version.
fn dialect(url: &str) -> Outcome<String> {
    let is_none = || format!("{url} is no nfs://host:port/path");
    let (place, path) = url
        .strip_prefix("nfs://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or_else(is_none)?;
    let path = path.split('?').next().unwrap_or_default();
    let (host, port) = place.rsplit_once(':').ok_or_else(is_none)?;
    Ok(format!("nfs://{host}/{path}?version=4&nfsport={port}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::case::text;
    use crate::harness::nfs::server::{Plan, Server};

    #[test]
    fn it_reads_what_is_in_the_image_and_says_why_it_cannot() {
        const BYTES: usize = 3 << 20;
        let server = Server::start(Plan::image(BYTES as u64)).expect("ganesha is there");
        let content: Vec<u8> = (0..=250).cycle().take(BYTES).collect();
        let image = std::fs::File::options()
            .write(true)
            .open(server.path("export/image.raw"))
            .expect("a file");
        image.write_all_at(&content, 0).expect("there is room");
        assert!(read(&server.url("export/image.raw")).expect("it serves") == content);
        let failed = read(&server.url("export/none.raw")).expect_err("there is no such file");
        assert!(text(&failed).contains("nfs-cat"), "{}", text(&failed));
        assert!(read("nfs://nowhere").is_err());
    }

    #[test]
    fn libnfs_gets_the_port_and_the_version_as_arguments() {
        let found = dialect("nfs://127.0.0.1:12345/export/a.raw?uid=1").expect("an URL");
        assert_eq!(found, "nfs://127.0.0.1/export/a.raw?version=4&nfsport=12345");
    }
}
