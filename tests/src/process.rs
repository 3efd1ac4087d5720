//! A process seen from outside, by /proc.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Outcome;

/// A process by its number; it may be gone at any time, then every look at it is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(pub u32);

/// Copies a program that is to be started: by a process of its own, because a child that is being made by another thread
/// may have inherited what this one writes to, and nobody can execute what somebody can write.
///
/// # Errors
///
/// When it cannot be copied.
pub fn copy_program(from: &Path, to: &Path) -> Outcome {
    let copied = std::process::Command::new("cp").arg(from).arg(to).status()?;
    crate::ensure!(copied.success(), "{} cannot be copied", from.display());
    Ok(())
}

/// What a process holds at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads, without the workers that the kernel lends an io_uring and takes back as it likes.
    pub threads: usize,
    /// Memory that is resident, in KiB.
    pub resident_kib: u64,
}

/// What one thread has used of the processors so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadTime {
    /// The thread's number.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Time on a processor, exact to the nanosecond: the scheduler's figure.
    pub total: Duration,
    /// The part of it inside the kernel, exact to a clock tick.
    pub system: Duration,
}

/// How far apart two looks at a process are that must agree.
const SETTLE_PERIOD: Duration = Duration::from_millis(50);
/// How long a process may take to come to rest.
const SETTLE_SECONDS_MAX: u64 = 5;

impl Process {
    /// What the process holds now.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn holdings(self) -> Outcome<Holdings> {
        let names = self.thread_names()?;
        let threads = names.iter().filter(|name| !name.starts_with("iou-wrk-")).count();
        Ok(Holdings {
            descriptors: self.descriptors()?.len(),
            threads,
            resident_kib: self.status_kib("VmRSS")?,
        })
    }

    /// [`Self::holdings`] when nothing is on its way out any more: the API closes the connection of a client that
    /// has gone a moment later, and a worker of the kernel gets its name a moment after it was made.
    ///
    /// # Errors
    ///
    /// When the process is gone, or does not come to rest.
    pub fn settled_holdings(self) -> Outcome<Holdings> {
        let deadline = Instant::now() + Duration::from_secs(SETTLE_SECONDS_MAX);
        let mut last = self.holdings()?;
        loop {
            std::thread::sleep(SETTLE_PERIOD);
            let now = self.holdings()?;
            if (now.descriptors, now.threads) == (last.descriptors, last.threads) {
                return Ok(now);
            }
            crate::ensure!(Instant::now() < deadline, "no rest: {last:?}, then {now:?}");
            last = now;
        }
    }

    /// What each open descriptor refers to.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn descriptors(self) -> Outcome<Vec<PathBuf>> {
        let entries = fs::read_dir(self.path("fd"))?;
        Ok(entries
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .collect())
    }

    /// The names of the threads.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn thread_names(self) -> Outcome<Vec<String>> {
        let tasks = fs::read_dir(self.path("task"))?;
        let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
        Ok(tasks
            .filter_map(|task| Some(name(task.ok()?)?.trim_end().to_owned()))
            .collect())
    }

    /// The number of the thread of this name.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn thread_named(self, name: &str) -> Outcome<u32> {
        for task in fs::read_dir(self.path("task"))? {
            let task = task?;
            let comm = fs::read_to_string(task.path().join("comm"))?;
            if comm.trim_end() == name {
                return Ok(task.file_name().to_string_lossy().parse()?);
            }
        }
        Err(format!("there is no thread {name}").into())
    }

    /// CPU time of all threads so far.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn cpu_time(self) -> Outcome<Duration> {
        let stat = fs::read_to_string(self.path("stat"))?;
        // The name in parentheses may contain spaces; the numbers begin behind it with field 3.
        let numbers = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest)
            .ok_or("no name in stat")?;
        let mut fields = numbers.split_whitespace().skip(14 - 3);
        let ticks = |field: Option<&str>| field.and_then(|f| f.parse::<u64>().ok()).ok_or("stat is short");
        let total = ticks(fields.next())? + ticks(fields.next())?;
        Ok(Duration::from_millis(
            total * 1000 / rustix::param::clock_ticks_per_second(),
        ))
    }

    /// What each thread has used so far. Threads that end meanwhile are left out.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn thread_times(self) -> Outcome<Vec<ThreadTime>> {
        let tasks = fs::read_dir(self.path("task"))?;
        Ok(tasks.filter_map(|task| thread_time(&task.ok()?.path())).collect())
    }

    /// A line of /proc/PID/status that is a number of KiB.
    ///
    /// # Errors
    ///
    /// When the process is gone or has no such line.
    pub fn status_kib(self, line: &str) -> Outcome<u64> {
        let status = fs::read_to_string(self.path("status"))?;
        let number = status
            .lines()
            .find_map(|l| l.strip_prefix(line)?.strip_prefix(':')?.split_whitespace().next());
        Ok(number
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| format!("no {line} in the status of {}", self.0))?)
    }

    /// The resident part, in KiB, of mappings of exactly this size: guest memory.
    ///
    /// # Errors
    ///
    /// When the process is gone or has no such mapping.
    pub fn resident_kib_of_mapping(self, bytes: u64) -> Outcome<u64> {
        let maps = fs::read_to_string(self.path("smaps"))?;
        let (mut found, mut sum, mut is_inside) = (false, 0, false);
        for line in maps.lines() {
            if let Some((start, end)) = range(line) {
                is_inside = end - start >= bytes;
                found |= is_inside;
            } else if is_inside && let Some(kib) = line.strip_prefix("Rss:") {
                sum += kib.trim().trim_end_matches(" kB").parse::<u64>()?;
            }
        }
        crate::ensure!(found, "process {} maps no {bytes} bytes in one piece", self.0);
        Ok(sum)
    }

    /// The bytes of the mapping of at least this size: guest memory, as the monitor sees it.
    ///
    /// # Errors
    ///
    /// When the process is gone, or may not be read.
    pub fn read_mapping(self, bytes: u64) -> Outcome<Vec<u8>> {
        use std::os::unix::fs::FileExt;
        let maps = fs::read_to_string(self.path("maps"))?;
        let mapping = maps
            .lines()
            .filter_map(range)
            .find(|(start, end)| end - start >= bytes);
        let (start, _) = mapping.ok_or_else(|| format!("process {} maps no {bytes} bytes", self.0))?;
        let mut content = vec![0; usize::try_from(bytes)?];
        fs::File::open(self.path("mem"))?.read_exact_at(&mut content, start)?;
        Ok(content)
    }

    /// Whether there is still such a process.
    pub fn is_there(self) -> bool {
        self.path("").exists()
    }

    fn path(self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.0.to_string()).join(name)
    }
}

/// Processes whose command line contains `text`.
///
/// # Errors
///
/// When /proc cannot be read.
pub fn processes_with(text: &str) -> Outcome<Vec<Process>> {
    let ids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mentions = |id: &u32| {
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    };
    Ok(ids.filter(mentions).map(Process).collect())
}

/// Unix sockets that the kernel knows under a path that contains `text`.
///
/// # Errors
///
/// When /proc cannot be read.
pub fn sockets_with(text: &str) -> Outcome<usize> {
    Ok(fs::read_to_string("/proc/net/unix")?
        .lines()
        .filter(|line| line.contains(text))
        .count())
}

/// What the thread with this directory in /proc has used, if it is there.
fn thread_time(task: &Path) -> Option<ThreadTime> {
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    let schedule = fs::read_to_string(task.join("schedstat")).ok()?;
    // The name in parentheses may contain anything; the numbers begin behind it with field 3.
    let (head, numbers) = stat.rsplit_once(')')?;
    let (id, name) = head.split_once(" (")?;
    let system_ticks: u64 = numbers.split_whitespace().nth(15 - 3)?.parse().ok()?;
    let total_ns = schedule.split_whitespace().next()?.parse().ok()?;
    Some(ThreadTime {
        id: id.parse().ok()?,
        name: name.to_owned(),
        total: Duration::from_nanos(total_ns),
        system: Duration::from_millis(system_ticks * 1000 / rustix::param::clock_ticks_per_second()),
    })
}

/// The range at the start of a line of maps.
fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}
