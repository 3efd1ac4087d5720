//! A guest on an overlay sees the base, and the base does not see the guest.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image, run};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_guest_sees_its_base_and_its_own_writes_and_the_base_stays_as_it_was",
        need: Need::Kvm,
        run: a_guest_sees_its_base_and_its_own_writes,
    },
    Case {
        name: "a_kept_overlay_is_found_again",
        need: Need::Kvm,
        run: a_kept_overlay_is_found_again,
    },
    Case {
        name: "guests_share_a_base",
        need: Need::Kvm,
        run: guests_share_a_base,
    },
    Case {
        name: "nothing_is_left_of_an_overlay_whose_monitor_was_killed",
        need: Need::Kvm,
        run: nothing_is_left_of_an_overlay_whose_monitor_was_killed,
    },
    Case {
        name: "an_overlay_that_makes_no_sense_is_refused_with_the_remedy",
        need: Need::Nothing,
        run: an_overlay_that_makes_no_sense_is_refused,
    },
];

const END_WITHIN: Duration = Duration::from_secs(60);
const BASE_MIB: u64 = 16;

/// A base that a guest has filled with the pattern of seed 5, and what it holds.
struct Base {
    directory: TempDir,
    content: Vec<u8>,
}

impl Base {
    fn new(context: &Context) -> Outcome<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("base");
        blank_image(&path, BASE_MIB)?;
        let drive = json!({ "drive_id": "d", "path_on_host": path, "is_root_device": false });
        let words = format!("do=pattern-write:mib={BASE_MIB},seed=5");
        let machine = Machine::unikernel(&context.environment, &words).drive(drive);
        run(Launch::new(&context.environment)?, &machine, END_WITHIN)?.expect(0)?;
        let content = fs::read(path)?;
        Ok(Self { directory, content })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A drive over the base that writes to `path`.
    fn drive(&self, path: &Path, keep: bool, extra: &Value) -> Value {
        let overlay = json!({ "base": self.path("base"), "path": path, "keep": keep });
        let mut drive = json!({ "drive_id": "d", "is_root_device": false, "overlay": overlay });
        for (key, value) in extra.as_object().into_iter().flatten() {
            if let Some(drive) = drive.as_object_mut() {
                drive.insert(key.clone(), value.clone());
            }
        }
        drive
    }

    /// Runs a guest over the base to its end, which is a good one.
    fn serves(&self, context: &Context, drive: Value, words: &str) -> Outcome {
        let machine = Machine::unikernel(&context.environment, words).drive(drive);
        let ended = run(Launch::new(&context.environment)?, &machine, END_WITHIN)?;
        ended
            .expect(0)
            .map_err(|e| format!("{words}: {}", text(&e)).into())
    }

    fn is_as_it_was(&self) -> Outcome {
        ensure!(
            fs::read(self.path("base"))? == self.content,
            "the base has changed"
        );
        Ok(())
    }

    /// What there is, without the records of the lease under which the base was written.
    fn names(&self) -> Outcome<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.directory.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.retain(|name| !name.starts_with("base.lease."));
        names.sort();
        Ok(names)
    }
}

fn a_guest_sees_its_base_and_its_own_writes(context: &Context) -> Outcome {
    let base = Base::new(context)?;
    // Sectors that begin and end within clusters, between others that are left as they are.
    let words = "do=pattern-verify:mib=16,seed=5 do=pattern-write:mib=3,offset_mib=2,bs=3584,depth=16,seed=9 \
                 do=pattern-write:mib=4,offset_mib=7,bs=65536,depth=8,seed=8 do=flush \
                 do=pattern-verify:mib=2,seed=5 do=pattern-verify:mib=3,offset_mib=2,seed=9 \
                 do=pattern-verify:mib=2,offset_mib=5,seed=5 do=pattern-verify:mib=4,offset_mib=7,seed=8 \
                 do=pattern-verify:mib=5,offset_mib=11,seed=5";
    for engine in ["Async", "Sync"] {
        for cache in ["Unsafe", "Writeback"] {
            for path in [PathBuf::from("memory"), base.path("overlay")] {
                let extra = json!({ "io_engine": engine, "cache_type": cache });
                let words = if cache == "Unsafe" {
                    words.replace(" do=flush", "")
                } else {
                    words.to_owned()
                };
                base.serves(context, base.drive(&path, false, &extra), &words)
                    .map_err(|e| format!("{engine} {cache} {}: {}", path.display(), text(&e)))?;
                ensure!(
                    base.names()? == ["base"],
                    "an overlay is left: {:?}",
                    base.names()?
                );
            }
        }
    }
    base.is_as_it_was()
}

fn a_kept_overlay_is_found_again(context: &Context) -> Outcome {
    let base = Base::new(context)?;
    let overlay = base.path("overlay");
    let drive = || base.drive(&overlay, true, &json!({ "cache_type": "Writeback" }));
    base.serves(
        context,
        drive(),
        "do=pattern-write:mib=2,offset_mib=4,bs=4096,depth=32,seed=9 do=flush",
    )?;
    let records = fs::read_dir(base.directory.path())?
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok())
        .filter(|record| record.contains("released"))
        .count();
    ensure!(
        records > 0,
        "the lease of the overlay ended without a record of it"
    );
    let allocated_bytes = fs::metadata(&overlay)?.blocks() * 512;
    ensure!(
        (2 << 20..3 << 20).contains(&allocated_bytes),
        "two mebibytes were written, and the overlay takes {allocated_bytes} bytes"
    );
    base.serves(
        context,
        drive(),
        "do=pattern-verify:mib=4,seed=5 do=pattern-verify:mib=2,offset_mib=4,seed=9 \
         do=pattern-verify:mib=10,offset_mib=6,seed=5",
    )?;
    base.is_as_it_was()?;
    let mut changed = base.content.clone();
    if let Some(byte) = changed.first_mut() {
        *byte ^= 1;
    }
    fs::write(base.path("base"), changed)?;
    let machine = Machine::unikernel(&context.environment, "do=hello").drive(drive());
    let ended = run(Launch::new(&context.environment)?, &machine, END_WITHIN)?;
    ended.expect(152)?;
    ensure!(
        ended.errors.contains("is another image or was changed since"),
        "the refusal does not say why:\n{}",
        ended.errors
    );
    Ok(())
}

fn guests_share_a_base(context: &Context) -> Outcome {
    let base = Base::new(context)?;
    let mut monitors = Vec::new();
    for seed in [11, 12] {
        let words = format!(
            "do=pattern-verify:mib=16,seed=5 do=pattern-write:mib=8,bs=4096,depth=32,seed={seed} \
             do=pattern-verify:mib=8,seed={seed} do=pattern-verify:mib=8,offset_mib=8,seed=5"
        );
        let drive = base.drive(Path::new("memory"), false, &json!({}));
        let machine = Machine::unikernel(&context.environment, &words).drive(drive);
        let launch = Launch::new(&context.environment)?.config(&machine.config())?;
        monitors.push(launch.start()?);
    }
    for monitor in monitors {
        monitor.wait(END_WITHIN)?.expect(0)?;
    }
    base.is_as_it_was()
}

fn nothing_is_left_of_an_overlay_whose_monitor_was_killed(context: &Context) -> Outcome {
    let base = Base::new(context)?;
    let drive = base.drive(&base.path("overlay"), false, &json!({}));
    let words = "do=pattern-write:mib=8,seed=1 do=tick:ms=100,count=600";
    let machine = Machine::unikernel(&context.environment, words).drive(drive);
    let launch = Launch::new(&context.environment)?.config(&machine.config())?;
    let monitor: Monitor = launch.start()?;
    monitor.console.wait_for("tick: n=1", END_WITHIN)?;
    ensure!(
        base.names()? == ["base"],
        "the overlay has a name: {:?}",
        base.names()?
    );
    let patch = json!({ "drive_id": "d", "path_on_host": "x" });
    let answer = monitor.request("PATCH", "/drives/d", Some(&patch))?;
    let said = format!("{answer:?}");
    ensure!(said.contains("400") && said.contains("is an overlay"), "{said}");
    monitor.signal(Signal::KILL)?;
    let _ended = monitor.wait(END_WITHIN)?;
    ensure!(
        base.names()? == ["base"],
        "something is left: {:?}",
        base.names()?
    );
    base.is_as_it_was()
}

fn an_overlay_that_makes_no_sense_is_refused(context: &Context) -> Outcome {
    let monitor = Launch::new(&context.environment)?.start()?;
    let (base, path) = (
        monitor.directory().join("test-base"),
        monitor.directory().join("test-overlay"),
    );
    blank_image(&base, 1)?;
    let overlay = json!({ "base": base, "path": path });
    for (drive, remedy) in [
        (
            json!({ "path_on_host": "x", "overlay": overlay }),
            "leave one of them out",
        ),
        (
            json!({ "is_read_only": true, "overlay": overlay }),
            "leave `is_read_only` out",
        ),
        (
            json!({ "overlay": { "base": "b", "path": "memory", "keep": true } }),
            "leave `keep` out",
        ),
        (
            json!({ "overlay": { "base": "", "path": "p" } }),
            "`base` names an image",
        ),
        (json!({ "overlay": { "base": "b" } }), "missing field `path`"),
        (
            json!({ "overlay": { "base": "b", "path": "b" } }),
            "name another file for the overlay",
        ),
        (
            json!({ "overlay": { "base": "b", "path": "p", "keep": true } }),
            "set cache_type to `Writeback`",
        ),
    ] {
        let mut body = json!({ "drive_id": "d", "is_root_device": false });
        for (key, value) in drive.as_object().into_iter().flatten() {
            if let Some(body) = body.as_object_mut() {
                body.insert(key.clone(), value.clone());
            }
        }
        let answer = monitor.request("PUT", "/drives/d", Some(&body))?;
        let said = format!("{answer:?}");
        ensure!(said.contains("400"), "{body} is taken: {said}");
        ensure!(said.contains(remedy), "no '{remedy}' in {said}");
    }
    let mut kept = overlay.clone();
    if let Some(fields) = kept.as_object_mut() {
        fields.insert("keep".to_owned(), true.into());
    }
    let body = json!({
        "drive_id": "d", "is_root_device": false, "overlay": kept, "cache_type": "Writeback"
    });
    monitor.must("PUT", "/drives/d", Some(&body))?;
    ensure!(!path.exists(), "an overlay is made before its machine starts");
    Ok(())
}
