//! What the monitors of a test run have asked of the kernel, beside the policy that says what they may.
//!
//! A trace is strace's, of one process, with the names of its threads and all arguments as numbers
//! (`-f --decode-pids=comm -e raw=all`). Calls that a thread makes before it has its own filter are those of the start.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::Outcome;

/// A policy, and which of its rules have been used.
#[derive(Debug)]
pub struct Audit {
    rules: Vec<Rule>,
    /// What no rule allows, and how often it was asked for.
    refused: BTreeMap<(String, String), u64>,
    calls: u64,
}

#[derive(Debug)]
struct Rule {
    kind: String,
    syscall: String,
    conditions: Vec<Condition>,
    /// Why no run of the tests needs it, if none does.
    rare: Option<String>,
    is_used: bool,
}

/// Of one argument, by its lower 32 bits.
#[derive(Debug)]
struct Condition {
    index: usize,
    mask: u32,
    value: u32,
}

/// One call of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Call<'a> {
    thread: &'a str,
    name: &'a str,
    syscall: &'a str,
    arguments: Vec<Option<u64>>,
}

/// What a thread has done that tells kinds with one name apart.
#[derive(Clone, Copy, Debug, Default)]
struct Thread {
    has_ring: bool,
    has_records: bool,
    /// Its ring may do what sockets need.
    has_sockets: bool,
    /// It has sent by itself.
    has_sent: bool,
}

/// Filters of the policy on a thread that has its own: the process's comes before it.
const WITH_OWN: u32 = 2;
/// `IORING_REGISTER_RESTRICTIONS`, of a ring that another thread enables later.
const RESTRICT: u64 = 11;
/// `IORING_REGISTER_ENABLE_RINGS`.
const ENABLE: u64 = 12;
/// How many restrictions a ring has that is for files alone (`storage/src/ring/restrictions.rs`).
const RESTRICTIONS_OF_FILES: u64 = 10;
/// `SECCOMP_SET_MODE_FILTER`.
const SET_FILTER: u64 = 1;
/// The flag of filters whose refusals are told in the log, as those that answer something are not.
const IS_LOGGED: u64 = 2;

impl Audit {
    /// Begins with a policy of which nothing has been used.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn new(policy: &str) -> Outcome<Self> {
        let policy: Value = serde_json::from_str(policy)?;
        let mut rules = Vec::new();
        for (kind, filter) in policy.as_object().ok_or("a policy is an object")? {
            let listed = filter.get("filter").and_then(Value::as_array);
            for rule in listed.ok_or("a filter has rules")? {
                rules.push(Rule::read(kind, rule).ok_or_else(|| format!("{kind}: {rule}"))?);
            }
        }
        Ok(Self {
            rules,
            refused: BTreeMap::new(),
            calls: 0,
        })
    }

    /// Takes the trace of one process in.
    pub fn read(&mut self, trace: &str) {
        let threads = known(trace);
        let first = trace
            .lines()
            .find_map(Call::read)
            .map(|call| call.thread.to_owned());
        let inherited = inherited(trace);
        let mut begun = BTreeMap::<&str, u32>::new();
        let mut is_filtered = false;
        for call in calls(trace) {
            let filters = begun.entry(call.thread).or_insert_with(|| {
                let known = inherited.get(call.thread).copied();
                known.unwrap_or(u32::from(is_filtered))
            });
            let of_first = first.as_deref() == Some(call.thread);
            let has_own = *filters >= WITH_OWN;
            let may_anything = !is_filtered;
            if call.is_filter() {
                *filters += 1;
                is_filtered = true;
            }
            if may_anything {
                continue;
            }
            let kind = match (of_first, has_own) {
                (true, true) => "vmm",
                (false, true) => kind_of(call.name, threads.get(call.thread).copied().unwrap_or_default()),
                _ => "start",
            };
            self.take(kind, &call);
        }
    }

    fn take(&mut self, kind: &str, call: &Call<'_>) {
        self.calls += 1;
        let mut is_allowed = false;
        // At the start, a thread may do what any thread may.
        let is_start = kind == "start";
        for rule in &mut self.rules {
            if rule.syscall == call.syscall
                && (rule.kind == kind || is_start)
                && rule.is_met(&call.arguments, is_start)
            {
                is_allowed = true;
                rule.is_used |= rule.kind == kind;
            }
        }
        if !is_allowed && !ANSWERED.contains(&call.syscall) {
            let asked = (kind.to_owned(), call.text());
            *self.refused.entry(asked).or_default() += 1;
        }
    }

    /// What there is to say, and whether all is well.
    pub fn report(&self) -> (String, bool) {
        let mut lines = Vec::new();
        let unused = self.rules.iter().filter(|rule| !rule.is_used);
        let (rare, unneeded): (Vec<_>, Vec<_>) = unused.partition(|rule| rule.rare.is_some());
        for rule in &unneeded {
            lines.push(format!("no thread has used {rule}"));
        }
        for rule in &rare {
            let why = rule.rare.as_deref().unwrap_or_default();
            lines.push(format!("no thread has used {rule}, which is rare: {why}"));
        }
        for rule in self
            .rules
            .iter()
            .filter(|rule| rule.is_used && rule.rare.is_some())
        {
            lines.push(format!("{rule} is not rare: it was used"));
        }
        for ((kind, call), times) in &self.refused {
            lines.push(format!(
                "{kind} has asked for {call} {times} times, which no rule allows"
            ));
        }
        let used = self.rules.iter().filter(|rule| rule.is_used).count();
        lines.push(format!(
            "{} calls; of {} rules {used} were used, {} are rare, {} are unneeded; {} kinds of calls were refused",
            self.calls,
            self.rules.len(),
            rare.len(),
            unneeded.len(),
            self.refused.len()
        ));
        let is_well = unneeded.is_empty() && self.refused.is_empty() && self.calls > 0;
        (lines.join("\n"), is_well)
    }
}

/// Calls that are answered by another filter than the policy's, as `vmm/src/seccomp/policy.rs` has it.
const ANSWERED: [&str; 4] = ["clone3", "madvise", "rt_sigprocmask", "sched_yield"];

impl Rule {
    fn read(kind: &str, rule: &Value) -> Option<Self> {
        let conditions = rule.get("args").and_then(Value::as_array).into_iter().flatten();
        Some(Self {
            kind: kind.to_owned(),
            syscall: rule.get("syscall")?.as_str()?.to_owned(),
            conditions: conditions.map(Condition::read).collect::<Option<_>>()?,
            rare: rule.get("rare").and_then(Value::as_str).map(ToOwned::to_owned),
            is_used: false,
        })
    }

    fn is_met(&self, arguments: &[Option<u64>], whatever: bool) -> bool {
        whatever
            || self
                .conditions
                .iter()
                .all(|condition| condition.is_met(arguments))
    }
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.kind, self.syscall)?;
        for Condition { index, mask, value } in &self.conditions {
            write!(f, " (argument {index} & {mask:#x} == {value:#x})")?;
        }
        Ok(())
    }
}

impl Condition {
    fn read(condition: &Value) -> Option<Self> {
        let number = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let mask = match condition.get("op")? {
            Value::String(op) if op == "eq" => u32::MAX,
            op => number(op.get("masked_eq")?)?,
        };
        Some(Self {
            index: usize::try_from(condition.get("index")?.as_u64()?).ok()?,
            mask,
            value: number(condition.get("val")?)?,
        })
    }

    fn is_met(&self, arguments: &[Option<u64>]) -> bool {
        // What strace could not write down may be anything.
        let argument = arguments.get(self.index).copied().flatten();
        argument.is_none_or(|argument| {
            (argument & u64::from(self.mask)) & 0xffff_ffff == u64::from(self.value & self.mask)
        })
    }
}

impl<'a> Call<'a> {
    /// A line of a trace, if a call begins there.
    fn read(line: &'a str) -> Option<Self> {
        let (thread, rest) = line.split_once('<')?;
        let (name, rest) = rest.split_once("> ")?;
        let (syscall, rest) = rest.split_once('(')?;
        if thread.is_empty()
            || !thread.bytes().all(|byte| byte.is_ascii_digit())
            || syscall.contains([' ', '<', '?'])
            || is_no_call(syscall)
        {
            return None;
        }
        let end = rest.find([')', '<']).unwrap_or(rest.len());
        let words = rest.get(..end)?.split(',').map(str::trim);
        let arguments = words.map(|word| match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        });
        Some(Self {
            thread,
            name,
            syscall,
            arguments: arguments.collect(),
        })
    }

    /// Whether it puts a filter of the policy on its thread, and not one that only answers.
    fn is_filter(&self) -> bool {
        let is_of_policy = |mode: &u64, flags: &u64| *mode == SET_FILTER && flags & IS_LOGGED != 0;
        match self.arguments.as_slice() {
            [Some(mode), Some(flags), ..] if self.syscall == "seccomp" => is_of_policy(mode, flags),
            _ => false,
        }
    }

    /// With the argument that says which of its operations it is, if it has some.
    fn text(&self) -> String {
        let index = match self.syscall {
            "prctl" | "socket" | "clone" | "rt_sigaction" => 0,
            "ioctl" | "fcntl" | "io_uring_register" | "kill" => 1,
            "tgkill" | "madvise" | "mmap" | "mprotect" => 2,
            _ => return self.syscall.to_owned(),
        };
        match self.arguments.get(index).copied().flatten() {
            Some(argument) => format!("{} (argument {index}: {argument:#x})", self.syscall),
            None => self.syscall.to_owned(),
        }
    }
}

/// So many arguments of a call, beside the first, show that it is what another has left.
const LEFT_MIN: usize = 3;

/// The calls of a trace; not what a thread is said to do last, while it is killed, in the words of the line before, or with the
/// arguments of its own call before but the first: of it strace has read nothing any more, or registers in which there is the
/// result of that.
fn calls(trace: &str) -> impl Iterator<Item = Call<'_>> {
    let mut last = BTreeMap::new();
    for (number, line) in trace.lines().enumerate() {
        if let Some((thread, _)) = line.split_once('<') {
            last.insert(thread, number);
        }
    }
    let mut before: Option<Call<'_>> = None;
    let mut own = BTreeMap::<&str, Call<'_>>::new();
    trace.lines().enumerate().filter_map(move |(number, line)| {
        let read = Call::read(line);
        let echoed = std::mem::replace(&mut before, read.clone());
        let call = read?;
        let is_last = line.ends_with(" <unfinished ...>") && last.get(call.thread) == Some(&number);
        let is_same = |other: Call<'_>| {
            call.thread != other.thread && call.syscall == other.syscall && call.arguments == other.arguments
        };
        let is_left = |other: Call<'_>| {
            let mut others = call.arguments.iter().zip(&other.arguments).skip(1);
            let known = call.arguments.iter().skip(1).flatten().count();
            known >= LEFT_MIN && others.all(|(now, then)| now == then)
        };
        let is_echo = echoed.is_some_and(is_same);
        let is_leftover = own.insert(call.thread, call.clone()).is_some_and(is_left);
        (!(is_last && (is_echo || is_leftover))).then_some(call)
    })
}

/// What strace writes for a process that was killed between the number of a call and the call.
fn is_no_call(name: &str) -> bool {
    const LARGEST: u64 = 0x1000;
    let number = name.strip_prefix("syscall_0x");
    number.is_some_and(|digits| u64::from_str_radix(digits, 16).is_ok_and(|number| number > LARGEST))
}

/// How many filters of the policy each thread has had from whoever made it.
fn inherited(trace: &str) -> BTreeMap<String, u32> {
    let mut inherited = BTreeMap::<String, u32>::new();
    let mut filters = BTreeMap::<&str, u32>::new();
    for line in trace.lines() {
        if let Some(call) = Call::read(line).filter(Call::is_filter) {
            let before = inherited.get(call.thread).copied().unwrap_or_default();
            *filters.entry(call.thread).or_insert(before) += 1;
        }
        // `10<name> clone(…) = 0xb`, or `10<name> <... clone resumed>) = 0xb`.
        let made = line.contains(" clone(") || line.contains(" clone3(") || line.contains("<... clone");
        if let (true, Some((parent, _)), Some((_, child))) =
            (made, line.split_once('<'), line.rsplit_once(" = "))
            && let Some(child) = child.strip_prefix("0x")
            && let Ok(child) = u32::from_str_radix(child, 16)
        {
            let of_parent = filters.get(parent).or_else(|| inherited.get(parent));
            let of_parent = of_parent.copied().unwrap_or_default();
            inherited.insert(child.to_string(), of_parent);
        }
    }
    inherited
}

/// What each thread of a trace has done that tells which kind it is.
fn known(trace: &str) -> BTreeMap<&str, Thread> {
    let mut threads = BTreeMap::<&str, Thread>::new();
    let mut restrictions = BTreeMap::new();
    for call in trace.lines().filter_map(Call::read) {
        let thread = threads.entry(call.thread).or_default();
        if let ("io_uring_register", [ring, operation, _, count, ..]) =
            (call.syscall, call.arguments.as_slice())
        {
            match *operation {
                Some(RESTRICT) => drop(restrictions.insert(*ring, *count)),
                Some(ENABLE) => {
                    let count = restrictions.get(ring).copied().flatten();
                    thread.has_sockets |= count.is_some_and(|count| count > RESTRICTIONS_OF_FILES);
                }
                _ => {}
            }
        }
        thread.has_ring |= call.syscall == "io_uring_enter";
        thread.has_records |= call.syscall == "openat";
        thread.has_sent |= call.syscall == "sendmsg";
    }
    threads
}

/// The kind of a thread of that name, as those that make it say (`coracle_storage::threads`).
fn kind_of(name: &str, thread: Thread) -> &'static str {
    match name.split(' ').next().unwrap_or_default() {
        "vcpu" => "vcpu",
        "api" => "api",
        "rng" => "entropy",
        "net" => "net",
        "vsock" => "vsock",
        "balloon" => "balloon",
        "memory" => "memory",
        "pmem" => "pmem",
        "pager" | "fetcher" => "pager",
        "io" if !thread.has_ring && thread.has_sent => "io_plain_network",
        "io" if !thread.has_ring => "io_plain",
        "io" if thread.has_records => "io_recording",
        "io" if thread.has_sockets => "io_network",
        "io" => "io",
        _ => "mover",
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    const POLICY: &str = r#"{
        "start": { "filter": [{ "syscall": "seccomp", "comment": "…" }] },
        "vmm": { "filter": [{ "syscall": "read", "comment": "…" }, { "syscall": "dup", "comment": "…", "rare": "never" }] },
        "io": { "filter": [
            { "syscall": "io_uring_enter", "comment": "…" },
            { "syscall": "ioctl", "comment": "…", "args": [{ "index": 1, "type": "dword", "op": "eq", "val": 44672 }] }
        ] }
    }"#;

    #[test]
    fn rules_that_were_used_and_calls_that_no_rule_allows_are_told() {
        let mut audit = Audit::new(POLICY).unwrap();
        // The process's two filters, then that of the first thread; and those of a disk, which is another one.
        audit.read(concat!(
            "10<coracle> execve(0x1, 0x2, 0x3) = 0\n",
            "10<coracle> seccomp(0x1, 0, 0x7ffc) = 0\n",
            "10<coracle> seccomp(0x1, 0x2, 0x7ffc) = 0\n",
            "11<io d> seccomp(0x1, 0, 0x7ffc) = 0\n",
            "11<io d> seccomp(0x1, 0x2, 0x7ffc) = 0\n",
            "11<io d> io_uring_enter(0x4, 0x1, 0, 0x1, 0, 0x8 <unfinished ...>\n",
            "10<coracle> seccomp(0x1, 0x2, 0x7ffc) = 0\n",
            "11<io d> <... io_uring_enter resumed>) = 1\n",
            "11<io d> ioctl(0x5, 0xae80, 0) = 0\n",
            "11<io d> madvise(0x7f00, 0x1000, 0x4) = -1 (errno 38)\n",
            "10<coracle> read(0x3, 0x7f, 0x8) = 8\n",
        ));
        let (text, is_well) = audit.report();
        assert!(is_well, "{text}");
        assert!(text.contains("of 5 rules 4 were used, 1 are rare"), "{text}");
        assert!(text.contains("vmm: dup, which is rare: never"), "{text}");

        audit.read(concat!(
            "10<coracle> seccomp(0x1, 0x2, 0x7ffc) = 0\n",
            "12<io d> seccomp(0x1, 0x2, 0x7ffc) = 0\n",
            "12<io d> io_uring_enter(0x4, 0x1, 0, 0x1, 0, 0x8) = 1\n",
            "12<io d> ioctl(0x5, 0xae81, 0) = 0\n",
        ));
        let (text, is_well) = audit.report();
        assert!(
            !is_well && text.contains("io has asked for ioctl (argument 1: 0xae81) 1 times"),
            "{text}"
        );
    }

    #[test]
    fn a_thread_has_what_its_maker_has_and_what_is_no_call_is_none() {
        let mut audit = Audit::new(POLICY).unwrap();
        audit.read(concat!(
            "10<coracle> seccomp(0x1, 0x2, 0x7ffc) = 0\n",
            "10<coracle> clone(0x3d0f00, 0x7f, 0x7f, 0x7f, 0x7f) = 0xb\n",
            "11<spawner> clone(0x3d0f00, 0x7f, 0x7f, 0x7f, 0x7f <unfinished ...>\n",
            "11<spawner> <... clone resumed>) = 0xc\n",
            "12<io d> seccomp(0x1, 0x2, 0x7ffc) = 0\n",
            "12<io d> clone(0x3d0f00, 0x7f, 0x7f, 0x7f, 0x7f) = 0xd\n",
            "13<io d> io_uring_enter(0x4, 0x1, 0, 0x1, 0, 0x8) = 1\n",
            "13<io d> syscall_0xfffffffffffffff5(0x1, 0x2) = 1\n",
            "13<io d> ???( <unfinished ...>\n",
            "11<spawner> ioctl(0x1a, 0xae82, 0 <unfinished ...>\n",
            "13<io d> ioctl(0x1a, 0xae82, 0 <unfinished ...>\n",
            "14<io d> seccomp(0x1, 0x2, 0x7ffc) = 0\n",
            "14<io d> sendto(0x13, 0x5555, 0xec, 0x4000, 0, 0) = 0xec\n",
            "14<io d> vserver(0, 0x5555, 0xec, 0x4000, 0 <unfinished ...>\n",
        ));
        let (text, _) = audit.report();
        assert!(!text.contains("used io: io_uring_enter"), "{text}");
        assert!(!text.contains("syscall_0x") && !text.contains('?'), "{text}");
        assert!(
            !text.contains("io has asked for ioctl") && !text.contains("vserver"),
            "{text}"
        );
        // What the thread that makes others asks for is the start's.
        assert!(text.contains("start has asked for clone"), "{text}");
    }

    #[test]
    fn what_nobody_has_used_is_told_and_a_run_without_calls_is_none() {
        let audit = Audit::new(POLICY).unwrap();
        let (text, is_well) = audit.report();
        assert!(
            !is_well && text.contains("no thread has used io: io_uring_enter\n"),
            "{text}"
        );
    }
}
