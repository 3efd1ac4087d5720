//! Guest memory is where it should be, and costs nothing before it is touched.

use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Case, Context, text};
use coracle_tests::certificates::Authority;
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, run};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::json;

use super::snapshot::{Files, killed, loaded, saved, started};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "untouched_memory_is_not_resident",
        need: Need::Kvm,
        run: untouched_memory_is_not_resident,
    },
    Case {
        name: "all_memory_is_usable",
        need: Need::Kvm,
        run: all_memory_is_usable,
    },
    Case {
        name: "memory_goes_on_above_the_hole",
        need: Need::Kvm,
        run: memory_goes_on_above_the_hole,
    },
    Case {
        name: "huge_pages_are_used_or_what_is_missing_is_said",
        need: Need::Kvm,
        run: huge_pages,
    },
    Case {
        name: "the_acpi_tables_are_valid",
        need: Need::Kvm,
        run: the_acpi_tables_are_valid,
    },
    Case {
        name: "the_vmclock_tells_of_every_load_and_move",
        need: Need::Kvm,
        run: the_vmclock_tells,
    },
    Case {
        name: "the_entropy_device_delivers",
        need: Need::Kvm,
        run: the_entropy_device_delivers,
    },
];

const SOON: Duration = Duration::from_secs(60);

fn untouched_memory_is_not_resident(context: &Context) -> Outcome {
    for backing in ["anonymous", "memfd"] {
        let machine =
            Machine::unikernel(&context.environment, "do=hello do=spin:seconds=forever").memory_mib(1024);
        let mut config = machine.config();
        if let Some(part) = config
            .pointer_mut("/machine-config")
            .and_then(|part| part.as_object_mut())
        {
            part.insert("memory_backing".into(), json!(backing));
        }
        let monitor = Launch::new(&context.environment)?.config(&config)?.start()?;
        monitor.console.wait_for("hello", SOON)?;
        let resident = monitor.process().holdings()?.resident_kib;
        ensure!(
            resident < 32 << 10,
            "{backing}: {resident} KiB of 1 GiB are resident"
        );
    }
    Ok(())
}

fn all_memory_is_usable(context: &Context) -> Outcome {
    for mib in [24, 128, 257] {
        let words = format!("do=info do=dirty:mib={},ms=100", mib / 2);
        let machine = Machine::unikernel(&context.environment, &words).memory_mib(mib);
        let ended = run(Launch::new(&context.environment)?, &machine, SOON)?;
        ended.expect(0).map_err(|e| format!("{mib} MiB: {}", text(&e)))?;
        let kib = memory_kib(&ended.console)?;
        // The first megabyte is not all memory.
        ensure!(
            kib <= u64::from(mib) << 10 && kib + 1024 >= u64::from(mib) << 10,
            "{mib} MiB: {kib} KiB"
        );
    }
    Ok(())
}

fn memory_goes_on_above_the_hole(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=info").memory_mib(6144);
    let ended = run(Launch::new(&context.environment)?, &machine, SOON)?;
    ended.expect(0)?;
    let kib = memory_kib(&ended.console)?;
    ensure!(kib + 1024 >= 6144 << 10, "{kib} KiB of 6 GiB");
    Ok(())
}

/// What `info` says.
fn memory_kib(console: &str) -> Outcome<u64> {
    let number = console
        .split("memory_kib=")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next());
    Ok(number
        .ok_or_else(|| format!("no memory_kib in {console}"))?
        .parse()?)
}

fn huge_pages(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=hello").memory_mib(64);
    let mut config = machine.config();
    if let Some(part) = config
        .pointer_mut("/machine-config")
        .and_then(|part| part.as_object_mut())
    {
        part.insert("huge_pages".into(), json!("2M"));
    }
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let has_enough = free.is_ok_and(|free| free.trim().parse::<u64>().is_ok_and(|free| free >= 32));
    let ended = Launch::new(&context.environment)?
        .without_api()
        .config(&config)?
        .spawn()?
        .wait(SOON)?;
    if has_enough {
        return ended.expect(0);
    }
    ended.expect(152)?;
    ensure!(
        ended.errors.contains("nr_hugepages") || ended.errors.contains("vm.nr_huge"),
        "{}",
        ended.errors
    );
    Ok(())
}

/// What a guest reads of its VMClock: disruptions, and generations.
fn vmclock(monitor: &Monitor) -> Outcome<(u64, u64)> {
    const ADDRESS: usize = 0xd_e000;
    let memory = monitor.process().read_mapping(64 << 20)?;
    let page = memory.get(ADDRESS..ADDRESS + 112).ok_or("the page is memory")?;
    ensure!(page.starts_with(b"VCLK"), "{page:x?}");
    let number = |at: usize| {
        let bytes = page.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    ensure!(number(12) & 1 == 0, "somebody is still writing it: {page:x?}");
    Ok((number(16), number(104)))
}

fn the_vmclock_tells(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let machine =
        Machine::unikernel(&context.environment, "do=hello do=tick:ms=20,count=100000").memory_mib(64);
    let first = started(context, &machine.config())?;
    first.console.wait_for("tick: n=1 ", SOON)?;
    ensure!(vmclock(&first)? == (0, 0), "{:?}", vmclock(&first)?);
    let files = Files::in_directory(directory.path(), "test-clock");
    saved(&first, &files, "Full")?;
    killed(first)?;
    let other = loaded(context, &files, "off")?;
    ensure!(vmclock(&other)? == (1, 1), "{:?}", vmclock(&other)?);
    killed(other)?;

    // By pages that come when they are touched, then saved and loaded again, and moved.
    let lazy = loaded(context, &files, "lazy")?;
    lazy.console.wait_for("tick: n=", SOON)?;
    let again = Files::in_directory(directory.path(), "test-again");
    saved(&lazy, &again, "Full")?;
    killed(lazy)?;
    let source = loaded(context, &again, "off")?;
    ensure!(vmclock(&source)? == (2, 2), "{:?}", vmclock(&source)?);
    let tls = Authority::new(directory.path())?.host("127.0.0.1")?;
    let receive = json!({ "listen": "127.0.0.1:0", "tls": tls });
    let receiver = Receiver::of(Launch::new(&context.environment)?.start()?, &receive)?;
    let send = json!({ "to": receiver.to(), "tls": tls });
    source.must("PUT", "/migration/send", Some(&send))?;
    let arrived = receiver.received()?;
    ensure!(vmclock(&arrived)? == (3, 2), "{:?}", vmclock(&arrived)?);
    Ok(())
}

/// Takes the tables out of guest memory, and has the compiler of the reference implementation read them.
fn the_acpi_tables_are_valid(context: &Context) -> Outcome {
    const MIB: u64 = 64;
    let launch = Launch::new(&context.environment)?;
    let disk = launch.directory().join("test-disk");
    coracle_tests::guest::blank_image(&disk, 1)?;
    let machine = Machine::unikernel(&context.environment, "do=hello do=spin:seconds=forever")
        .memory_mib(64)
        .vcpus(2)
        .disk("d", &disk)
        .part("entropy", json!({}));
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("hello", SOON)?;
    let memory = monitor.process().read_mapping(MIB << 20)?;
    let tables = tables(&memory)?;
    for wanted in ["FACP", "APIC", "DSDT", "XSDT"] {
        ensure!(
            tables.iter().any(|(name, _)| name == wanted),
            "no {wanted} among the tables"
        );
    }
    for (name, table) in tables {
        ensure!(
            table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0,
            "the checksum of {name} is wrong"
        );
        let path = monitor.directory().join(format!("test-{name}.dat"));
        std::fs::write(&path, table)?;
        let read = Command::new("iasl").arg("-d").arg(&path).output()?;
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&read.stdout),
            String::from_utf8_lossy(&read.stderr)
        );
        ensure!(read.status.success(), "{name}: {said}");
        ensure!(
            !said.contains("Warning") && !said.contains("Error"),
            "{name}: {said}"
        );
        if name == "DSDT" {
            // What was read can be written again, which checks it more strictly.
            let written = Command::new("iasl")
                .args(["-we", "-vr"])
                .arg(path.with_extension("dsl"))
                .output()?;
            let said = String::from_utf8_lossy(&written.stdout).into_owned();
            ensure!(
                written.status.success() && said.contains("0 Errors, 0 Warnings"),
                "{said}"
            );
        }
    }
    Ok(())
}

/// Every table that the root pointer leads to, by name (ACPI 6.5, section 5.2).
fn tables(memory: &[u8]) -> Outcome<Vec<(String, &[u8])>> {
    let word = |at: u64, bytes: usize| -> Outcome<u64> {
        let at = usize::try_from(at)?;
        let slice = memory.get(at..at + bytes).ok_or("a table lies outside memory")?;
        Ok(slice
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    };
    let table = |at: u64| -> Outcome<(String, &[u8])> {
        let length = usize::try_from(word(at + 4, 4)?)?;
        let start = usize::try_from(at)?;
        let bytes = memory
            .get(start..start + length)
            .ok_or("a table lies outside memory")?;
        Ok((
            String::from_utf8_lossy(bytes.get(..4).unwrap_or_default()).into_owned(),
            bytes,
        ))
    };
    let root = memory
        .chunks(16)
        .position(|chunk| chunk.starts_with(b"RSD PTR "))
        .ok_or("no root pointer")?;
    let xsdt = word(u64::try_from(root)? * 16 + 24, 8)?;
    let mut found = vec![table(xsdt)?];
    let entries = (word(xsdt + 4, 4)? - 36) / 8;
    for entry in 0..entries {
        let address = word(xsdt + 36 + entry * 8, 8)?;
        let named = table(address)?;
        if named.0 == "FACP" {
            let wide = word(address + 140, 8)?;
            found.push(table(if wide == 0 { word(address + 40, 4)? } else { wide })?);
        }
        found.push(named);
    }
    Ok(found)
}

fn the_entropy_device_delivers(context: &Context) -> Outcome {
    for wait in ["poll", "irq"] {
        let words = format!("do=rng:bytes=100000,wait={wait}");
        let machine = Machine::unikernel(&context.environment, &words).part("entropy", json!({}));
        run(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)?;
    }
    Ok(())
}
