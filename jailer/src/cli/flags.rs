//! The table of flags, from which the words are read and the help is written.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use super::CliError;

/// One flag.
#[derive(Debug)]
pub(super) struct Flag {
    /// Its name, without the dashes.
    pub(super) name: &'static str,
    /// What its value is called; `None` for a flag without one.
    value: Option<&'static str>,
    /// How often it may be given.
    times: Times,
    /// What it does.
    help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Times {
    Must,
    Once,
    Any,
}

const fn flag(name: &'static str, value: Option<&'static str>, times: Times, help: &'static str) -> Flag {
    Flag {
        name,
        value,
        times,
        help,
    }
}

/// Firecracker's flags.
const FIRECRACKER: &[Flag] = &[
    flag(
        "id",
        Some("ID"),
        Times::Must,
        "name of the machine: 1 to 64 letters, digits and dashes",
    ),
    flag("exec-file", Some("FILE"), Times::Must, "the monitor"),
    flag("uid", Some("UID"), Times::Must, "user that the monitor runs as"),
    flag("gid", Some("GID"), Times::Must, "group that the monitor runs as"),
    flag(
        "chroot-base-dir",
        Some("DIR"),
        Times::Once,
        "where jails are made [/srv/jailer]",
    ),
    flag(
        "netns",
        Some("FILE"),
        Times::Once,
        "network namespace that the monitor joins",
    ),
    flag(
        "daemonize",
        None,
        Times::Once,
        "leave the session, with /dev/null for input and output",
    ),
    flag(
        "new-pid-ns",
        None,
        Times::Once,
        "give the monitor a PID namespace of its own",
    ),
    flag(
        "cgroup",
        Some("FILE=VALUE"),
        Times::Any,
        "put the monitor into a cgroup of its own with this setting",
    ),
    flag(
        "resource-limit",
        Some("NAME=VALUE"),
        Times::Any,
        "fsize=BYTES, or no-file=DESCRIPTORS [no-file=2048]",
    ),
    flag(
        "cgroup-version",
        Some("1|2"),
        Times::Once,
        "version of the hierarchy [1]",
    ),
    flag(
        "parent-cgroup",
        Some("PATH"),
        Times::Once,
        "cgroup above the machine's own [name of the exec file]",
    ),
];

/// What goes beyond them.
const MORE: &[Flag] = &[
    flag(
        "copy-exec",
        None,
        Times::Once,
        "give the jail a copy of the monitor, so that it shares no memory with other machines'",
    ),
    flag(
        "cleanup",
        None,
        Times::Once,
        "stay, and remove at the end what was made for the jail, and nothing else",
    ),
    flag(
        "supervise",
        None,
        Times::Once,
        "stay, pass signals on, record how the monitor ended, end as it did",
    ),
    flag(
        "record",
        Some("FILE"),
        Times::Once,
        "append the record there [standard error]",
    ),
    flag(
        "restart",
        Some("never|on-failure"),
        Times::Once,
        "when to start the monitor again [never]",
    ),
    flag(
        "restart-limit",
        Some("N"),
        Times::Once,
        "give up after so many restarts in a row [5]",
    ),
    flag(
        "restart-delay-ms",
        Some("MS"),
        Times::Once,
        "wait so long first; doubles each time, up to 30000 [100]",
    ),
    flag(
        "file",
        Some("SRC[:NAME]"),
        Times::Any,
        "show the file or directory SRC in the jail, as NAME",
    ),
    flag(
        "fd",
        Some("N[:NAME]"),
        Times::Any,
        "show the file that descriptor N has open in the jail, as NAME",
    ),
];

/// The values of each flag that was given; a flag without a value has an empty one.
pub(super) type Given = BTreeMap<&'static str, Vec<OsString>>;

/// What the words ask for.
#[derive(Debug)]
pub(super) enum Words {
    Help,
    Version,
    Flags { given: Given, rest: Vec<OsString> },
}

/// Sorts the words by flag; those after `--` are the monitor's.
pub(super) fn sorted(words: impl IntoIterator<Item = OsString>) -> Result<Words, CliError> {
    let mut words = words.into_iter();
    let mut given = Given::new();
    while let Some(word) = words.next() {
        match word.as_bytes() {
            b"--" => break,
            b"--help" | b"-h" => return Ok(Words::Help),
            b"--version" | b"-V" => return Ok(Words::Version),
            _ => {}
        }
        let (flag, inline) = recognised(&word)?;
        let value = match (flag.value, inline) {
            (None, None) => OsString::new(),
            (None, Some(_)) => return Err(CliError::NoValue { flag: flag.name }),
            (Some(_), Some(value)) => value,
            (Some(called), None) => words
                .next()
                .filter(|value| !value.as_bytes().starts_with(b"--"))
                .ok_or(CliError::Value {
                    flag: flag.name,
                    called,
                })?,
        };
        let values = given.entry(flag.name).or_default();
        values.push(value);
        if flag.times != Times::Any && values.len() > 1 {
            return Err(CliError::Twice { flag: flag.name });
        }
    }
    for flag in FIRECRACKER.iter().filter(|flag| flag.times == Times::Must) {
        if !given.contains_key(flag.name) {
            return Err(CliError::Missing { flag: flag.name });
        }
    }
    let rest = words.collect();
    Ok(Words::Flags { given, rest })
}

/// The flag of this word, and the value behind a `=` in it.
fn recognised(word: &OsStr) -> Result<(&'static Flag, Option<OsString>), CliError> {
    let unknown = || CliError::Unknown {
        word: word.to_owned(),
    };
    let named = word.as_bytes().strip_prefix(b"--").ok_or_else(unknown)?;
    let mut parts = named.splitn(2, |byte| *byte == b'=');
    let name = parts.next().unwrap_or_default();
    let flag = FIRECRACKER
        .iter()
        .chain(MORE)
        .find(|flag| flag.name.as_bytes() == name)
        .ok_or_else(unknown)?;
    Ok((flag, parts.next().map(|value| OsString::from_vec(value.to_vec()))))
}

/// The help.
pub(super) fn help() -> String {
    let mut text = String::from(
        "Starts a monitor in a jail.\n\nusage: coracle-jailer FLAGS [-- ARGUMENTS OF THE MONITOR]\n",
    );
    for (title, flags) in [("Firecracker's flags", FIRECRACKER), ("More", MORE)] {
        text.push_str(&format!("\n{title}:\n"));
        for flag in flags {
            let left = format!("--{} {}", flag.name, flag.value.unwrap_or_default());
            let must = if flag.times == Times::Must {
                " (needed)"
            } else {
                ""
            };
            text.push_str(&format!("  {left:<28} {}{must}\n", flag.help));
        }
    }
    text
}
