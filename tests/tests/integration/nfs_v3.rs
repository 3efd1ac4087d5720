//! A golden image on a server that has NFSv3 only is the base of an overlay, on a host that has nothing mounted.

use std::error::Error;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use coracle_storage::backend::Access;
use coracle_storage::blocking::Blocking;
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::open;
use coracle_storage::overlay::OverlayConfig;
use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::harness::hosts::{Host, Star};
use coracle_tests::harness::nfs::server::{Plan, Server, url_by_rpcbind};
use coracle_tests::{Outcome, ensure};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "an_overlay_of_a_golden_image_survives_a_restart_of_its_filer",
        need: Need::Hosts,
        run: an_overlay_of_a_golden_image,
    },
    Case {
        name: "what_an_old_filer_cannot_give_is_said",
        need: Need::Hosts,
        run: what_an_old_filer_cannot_give,
    },
];

const IMAGE: &str = "export/image.raw";
const IMAGE_BYTES: u64 = 4 << 20;
/// How long the server is away while a read waits for it.
const AWAY: Duration = Duration::from_millis(500);

/// A server of NFSv3 with a golden image, and a client of it.
struct Filer {
    server: Server,
    star: Star,
    golden: Vec<u8>,
}

impl Filer {
    fn start() -> Outcome<Self> {
        let star = Star::new(1)?;
        let plan = Plan::image(IMAGE_BYTES).with_v3().minor_versions(&[]);
        let server = Server::start_on(&star.server, plan)?;
        let golden: Vec<u8> = (0..IMAGE_BYTES)
            .map(|at| u8::try_from(at / 4096 % 251).unwrap_or(0))
            .collect();
        let image = std::fs::File::options().write(true).open(server.path(IMAGE))?;
        image.write_all_at(&golden, 0)?;
        Ok(Self { server, star, golden })
    }

    /// The URL of the image for whoever asks the server for its ports.
    fn url(&self) -> String {
        format!("{}?version=3", url_by_rpcbind(Star::server_address(0), IMAGE))
    }

    fn client(&self) -> Outcome<Host> {
        self.star.clients.first().ok_or("there is one client")?.again()
    }
}

fn an_overlay_of_a_golden_image(_: &Context) -> Outcome {
    let mut filer = Filer::start()?;
    let place = tempfile::tempdir()?;
    let overlay = place.path().join("overlay");
    let base = format!("{}&base_immutable=true", filer.url());
    let client = filer.client()?;
    let (server, golden) = (&mut filer.server, &filer.golden);
    client.inside(|| written_and_read(&base, &overlay, golden, server))??;
    ensure!(
        std::fs::read(filer.server.path(IMAGE))? == filer.golden,
        "something was written to the base"
    );
    Ok(())
}

/// Writes to an overlay, and reads all of it while the server of its base restarts.
fn written_and_read(base: &str, overlay: &Path, golden: &[u8], server: &mut Server) -> Outcome {
    let config = OverlayConfig {
        base: base.to_owned(),
        path: overlay.display().to_string(),
        keep: true,
    };
    let owner = Owner::of_this_process("vm1");
    let image = config.open(&Terms::new(Lock::Exclusive, &owner))?;
    let _hold = image.hold;
    let mut disk = Blocking::new(image.backend)?;
    let mut expected = golden.to_vec();
    for (at, len, byte) in [(512, 512, 201), (1 << 20, 300_032, 202)] {
        let part = expected
            .get_mut(at..at + len)
            .ok_or("it is as long as the image")?;
        part.fill(byte);
        disk.write_at(at as u64, part)?;
    }
    let mut read = vec![0; expected.len()];
    let (first, rest) = read.split_at_mut(1 << 20);
    disk.read_at(0, first)?;
    server.kill()?;
    std::thread::scope(|scope| {
        let restarted = scope.spawn(|| {
            std::thread::sleep(AWAY);
            server.restart()
        });
        disk.read_at(1 << 20, rest)?;
        let restarted = restarted.join();
        restarted.map_err(|_| "whoever restarts the server panicked")?
    })?;
    ensure!(read == expected, "something else was read");
    Ok(())
}

fn what_an_old_filer_cannot_give(context: &Context) -> Outcome {
    let filer = Filer::start()?;
    let client = filer.client()?;
    let url = filer.url();
    let error = |access, lock| {
        let owner = Owner::of_this_process("vm1");
        let opened = client.inside(|| open(&url, access, &Terms::new(lock, &owner)).map(drop))?;
        Outcome::Ok(causes(&opened.err().ok_or("it was opened")?))
    };
    for (access, lock, word) in [
        (Access::ReadWrite, Lock::Exclusive, "keep a second writer away"),
        (Access::ReadOnly, Lock::Shared, "base_immutable=true"),
    ] {
        let said = error(access, lock)?;
        ensure!(said.contains(word), "no {word:?} in: {said}");
    }
    let coraclectl = &context.environment.coraclectl;
    let info = |url: &str| {
        client.inside(|| {
            Command::new(coraclectl)
                .args(["--json", "disk", "info", url])
                .output()
        })
    };
    let told = info(&url)??;
    let told: serde_json::Value = serde_json::from_slice(&told.stdout)?;
    ensure!(told.get("size_bytes") == Some(&IMAGE_BYTES.into()), "{told}");
    for (wrong, word) in [
        (
            url.replace("image.raw", "other.raw"),
            "no image `other.raw` in /export",
        ),
        (url.replace("export", "silver"), "it exports /export"),
        (url.replace("version=3", "version=4.1"), "does not answer"),
    ] {
        let done = info(&wrong)??;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(
            !done.status.success() && said.contains(word),
            "no {word:?} in: {said}"
        );
    }
    Ok(())
}

/// An error with all that has led to it.
fn causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&cause| cause.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}
