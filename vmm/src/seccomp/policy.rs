//! From a policy to programs for the kernel. The build script compiles the built-in one by this file, too.
//!
//! A policy is JSON as seccompiler has it, with a filter for each kind of thread, and one, `start`, for what the process does
//! before its guest runs. What any of them allows, the process may do at most: that is a filter of its own.

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::{BpfProgram, TargetArch};
use serde_json::{Map, Value, json};

/// The filters of a policy: that of the start, and one for each kind of thread.
pub(super) const KINDS: [&str; 17] = [
    "start",
    "vmm",
    "api",
    "vcpu",
    "io",
    "io_network",
    "io_recording",
    "io_plain",
    "io_plain_network",
    "entropy",
    "net",
    "vsock",
    "balloon",
    "memory",
    "pmem",
    "pager",
    "mover",
];
/// What all threads may do together.
pub(super) const PROCESS: &str = "process";
/// `clone3` has its flags in memory, where no filter sees them: it is answered with ENOSYS, and the C library uses `clone`.
pub(super) const NO_CLONE3: &str = "no_clone3";
/// What libraries ask for and do without where it is answered with ENOSYS: so no thread that does little has to be allowed it.
pub(super) const DISPENSABLE: &str = "dispensable";
/// The kinds of threads that do much, and are allowed it; and the one whose work it is.
const AT_LARGE: [&str; 5] = ["vmm", "pager", "mover", "balloon", "memory"];

/// At a thread's end, to give back a stack that the next thread has anyway, and to hear no signals any more, of which these
/// threads get none; and to let the other end of a channel go on that was interrupted, for which one may spin instead.
const DONE_WITHOUT: [&str; 3] = ["madvise", "rt_sigprocmask", "sched_yield"];

/// Why a policy is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum PolicyError {
    /// It is no JSON.
    #[error("it is no JSON")]
    Json(#[from] serde_json::Error),
    /// A filter that is not there, or not known.
    #[error("it has to have a filter for each of {}, and no other", KINDS.join(", "))]
    Kinds,
    /// Rules that say two things of one call.
    #[error(
        "the filter `{kind}` allows `{syscall}` with any arguments and with certain ones: leave one of the two out"
    )]
    Twice {
        /// The filter.
        kind: String,
        /// The call.
        syscall: String,
    },
    /// A filter by which a refused call could not be told.
    #[error(
        "the filter `{kind}` refuses `{syscall}`, by which a thread says which call it was refused and ends: allow both write \
         and exit_group there"
    )]
    Mute {
        /// The filter.
        kind: String,
        /// The call.
        syscall: &'static str,
    },
    /// A filter that makes no sense.
    #[error("it cannot be compiled")]
    Compile(#[from] seccompiler::Error),
}

/// What the handler of a refused call needs.
const LAST_WORDS: [&str; 2] = ["write", "exit_group"];

/// Whether threads of that kind do without what is dispensable.
pub(super) fn is_frugal(kind: &str) -> bool {
    !AT_LARGE.contains(&kind)
}

/// The programs of a policy by the kinds of threads that they are for, and those that are for all.
///
/// # Errors
///
/// Why there are none.
pub(super) fn compile(text: &str) -> Result<BTreeMap<String, BpfProgram>, PolicyError> {
    let mut policy: Map<String, Value> = serde_json::from_str(text)?;
    let kinds: BTreeSet<&str> = policy.keys().map(String::as_str).collect();
    if kinds != KINDS.into_iter().collect() {
        return Err(PolicyError::Kinds);
    }
    if cfg!(debug_assertions) {
        policy.values_mut().for_each(add_debug);
    }
    for (kind, filter) in &mut policy {
        check(kind, filter)?;
        forget_notes(filter);
    }
    let process = process(&policy);
    policy.remove("start");
    for (kind, filter) in &mut policy {
        if is_frugal(kind) {
            add_rules(filter, DONE_WITHOUT.map(|syscall| json!({ "syscall": syscall })));
        }
    }
    policy.insert(PROCESS.to_owned(), process);
    for (name, syscalls) in [(NO_CLONE3, &["clone3"][..]), (DISPENSABLE, &DONE_WITHOUT)] {
        let rules: Vec<Value> = syscalls
            .iter()
            .map(|syscall| json!({ "syscall": syscall }))
            .collect();
        let answered = json!({
            "mismatch_action": "allow", "match_action": { "errno": libc::ENOSYS }, "filter": rules
        });
        policy.insert(name.to_owned(), answered);
    }
    let text = serde_json::to_vec(&policy)?;
    let programs = seccompiler::compile_from_json(text.as_slice(), TargetArch::x86_64)?;
    Ok(programs.into_iter().collect())
}

/// Of two rules for one call, with arguments and without, the compiler would forget one; and a refused call is to be told.
fn check(kind: &str, filter: &Value) -> Result<(), PolicyError> {
    let rules = filter.get("filter").and_then(Value::as_array);
    let mut seen = BTreeMap::new();
    for rule in rules.into_iter().flatten() {
        let syscall = rule.get("syscall").and_then(Value::as_str).unwrap_or_default();
        let is_certain = rule.get("args").is_some();
        if *seen.entry(syscall).or_insert(is_certain) != is_certain {
            return Err(PolicyError::Twice {
                kind: kind.to_owned(),
                syscall: syscall.to_owned(),
            });
        }
    }
    // What is allowed at the start is so by what the whole process may.
    let traps = kind != "start" && filter.get("mismatch_action") == Some(&json!("trap"));
    match LAST_WORDS
        .into_iter()
        .find(|&syscall| traps && !seen.contains_key(syscall))
    {
        Some(syscall) => Err(PolicyError::Mute {
            kind: kind.to_owned(),
            syscall,
        }),
        None => Ok(()),
    }
}

/// A debug build looks at descriptors before it closes them.
fn add_debug(filter: &mut Value) {
    let rules = filter.get("filter").and_then(Value::as_array);
    let is_any = |rule: &Value| rule.get("args").is_none() && rule.get("syscall") == Some(&json!("fcntl"));
    if rules.is_some_and(|rules| rules.iter().any(is_any)) {
        return;
    }
    let rule = json!({
        "syscall": "fcntl", "args": [{ "index": 1, "type": "dword", "op": "eq", "val": libc::F_GETFD }]
    });
    add_rules(filter, [rule]);
}

/// Takes out what is for readers, and for the audit of the policy: why a rule is needed that is rarely used.
fn forget_notes(filter: &mut Value) {
    let rules = filter.get_mut("filter").and_then(Value::as_array_mut);
    for rule in rules.into_iter().flatten().filter_map(Value::as_object_mut) {
        rule.remove("rare");
    }
}

fn add_rules(filter: &mut Value, added: impl IntoIterator<Item = Value>) {
    if let Some(rules) = filter.get_mut("filter").and_then(Value::as_array_mut) {
        rules.extend(added);
    }
}

/// Calls by which a thread that was taken over would begin: namespaces and processes, signals, code, sockets of any kind. At the
/// start, too, nothing asks for more of them than the threads do.
const HELD: [&str; 5] = ["clone", "kill", "mmap", "mprotect", "socket"];

/// What any of the filters allows, whatever the arguments; but of [`HELD`] with the arguments that one of them wants, if none
/// allows it whatever they are.
fn process(policy: &Map<String, Value>) -> Value {
    let rules = policy
        .values()
        .filter_map(|filter| filter.get("filter")?.as_array());
    let mut calls: BTreeMap<&str, Vec<Option<&Value>>> = BTreeMap::new();
    for rule in rules.flatten() {
        if let Some(name) = rule.get("syscall").and_then(Value::as_str) {
            let known = calls.entry(name).or_default();
            let wanted = rule.get("args").filter(|_| HELD.contains(&name));
            if !known.contains(&wanted) {
                known.push(wanted);
            }
        }
    }
    let rules = calls.into_iter().flat_map(|(name, wanted)| -> Vec<Value> {
        if wanted.contains(&None) {
            return vec![json!({ "syscall": name })];
        }
        let wanted = wanted.into_iter().flatten();
        wanted
            .map(|args| json!({ "syscall": name, "args": args }))
            .collect()
    });
    let rules: Vec<Value> = rules.collect();
    let action = |name| {
        let first = policy.get("start").and_then(|filter| filter.get(name));
        first.cloned().unwrap_or_default()
    };
    json!({
        "mismatch_action": action("mismatch_action"), "match_action": action("match_action"), "filter": rules
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    const BUILT_IN: &str = include_str!("../../../resources/seccomp/x86_64.json");

    /// A policy with that filter for vCPUs.
    fn with_vcpu(rules: &Value) -> String {
        let mut policy: Map<String, Value> = serde_json::from_str(BUILT_IN).unwrap();
        let filter = json!({ "mismatch_action": "trap", "match_action": "allow", "filter": rules });
        policy.insert("vcpu".to_owned(), filter);
        Value::from(policy).to_string()
    }

    #[test]
    fn what_any_thread_may_the_process_may() {
        let policy: Map<String, Value> = serde_json::from_str(BUILT_IN).unwrap();
        let process = process(&policy);
        let names = |filter: &Value| -> BTreeSet<String> {
            let rules = filter.get("filter").unwrap().as_array().unwrap();
            let names = rules
                .iter()
                .map(|rule| rule.get("syscall").unwrap().as_str().unwrap());
            names.map(ToOwned::to_owned).collect()
        };
        for (kind, filter) in &policy {
            assert!(names(filter).is_subset(&names(&process)), "{kind}");
        }
        for held in HELD {
            let rules = process.get("filter").unwrap().as_array().unwrap();
            let mut of_it = rules.iter().filter(|rule| rule.get("syscall").unwrap() == held);
            assert!(of_it.all(|rule| rule.get("args").is_some()), "{held}");
        }
        for never in [
            "execve",
            "ptrace",
            "mount",
            "fork",
            "setns",
            "unshare",
            "keyctl",
            "kexec_load",
            "bpf",
        ] {
            assert!(!names(&process).contains(never), "{never}");
        }
    }

    #[test]
    fn there_is_a_program_for_each_kind_but_the_start_and_three_for_many() {
        let programs = compile(BUILT_IN).unwrap();
        let kinds: BTreeSet<&str> = programs.keys().map(String::as_str).collect();
        let expected = KINDS.into_iter().filter(|kind| *kind != "start");
        assert_eq!(kinds, expected.chain([PROCESS, NO_CLONE3, DISPENSABLE]).collect());
    }

    #[test]
    fn two_rules_of_which_one_would_be_forgotten_are_refused() {
        let certain = json!({
            "syscall": "ioctl", "args": [{ "index": 1, "type": "dword", "op": "eq", "val": 1 }]
        });
        let refused = compile(&with_vcpu(&json!([{ "syscall": "ioctl" }, certain])));
        assert!(matches!(refused, Err(PolicyError::Twice { .. })), "{refused:?}");
        let last_words = LAST_WORDS.map(|syscall| json!({ "syscall": syscall }));
        let [write, exit] = &last_words;
        assert!(compile(&with_vcpu(&json!([certain, certain, write, exit]))).is_ok());
    }

    #[test]
    fn a_filter_by_which_a_refused_call_could_not_be_told_is_refused() {
        let exit = json!({ "syscall": "exit_group" });
        let refused = compile(&with_vcpu(&json!([exit])));
        assert!(
            matches!(refused, Err(PolicyError::Mute { syscall: "write", .. })),
            "{refused:?}"
        );
    }
}
