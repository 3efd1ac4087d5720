//! Log lines as Firecracker writes them, to standard output, a file or a FIFO, without ever waiting.
//!
//! ```text
//! 2026-11-23T13:53:45.383079419 [id:thread:LEVEL:file:line] message
//! ```

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coracle_storage::utc::UtcSecond;
use log::{Log, Metadata, Record};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use crate::config::{Level, LoggerConfig};
use crate::line_sink::{LineSink, LineSinkError};

/// Longest line in bytes; what is beyond is cut off. A pipe takes as much at once.
pub const LINE_BYTES_MAX: usize = 4096;

/// Makes this the process's logger, for the instance `id`; to be called once, before any thread is made.
///
/// # Errors
///
/// The process has a logger.
pub fn install(id: &str) -> Result<(), log::SetLoggerError> {
    // A second call fails below.
    let _first_wins = LOGGER.id.set(id.to_owned());
    log::set_logger(&LOGGER)?;
    log::set_max_level(log::LevelFilter::Info);
    Ok(())
}

/// Changes where lines go and what they show.
///
/// # Errors
///
/// The path cannot be written to; then nothing has changed.
pub fn configure(config: &LoggerConfig) -> Result<(), LineSinkError> {
    let sink = config.log_path.as_deref().map(LineSink::open).transpose()?;
    let mut output = LOGGER.output();
    if let Some(sink) = sink {
        output.sink = Some(sink);
    }
    output.show_level = config.show_level.unwrap_or(output.show_level);
    output.show_origin = config.show_log_origin.unwrap_or(output.show_origin);
    if config.module.is_some() {
        output.module.clone_from(&config.module);
    }
    log::set_max_level(config.level.unwrap_or(Level::Info).filter());
    Ok(())
}

/// How many lines were lost because there was no room for them.
pub fn missed_lines() -> u64 {
    LOGGER.missed.load(Ordering::Relaxed)
}

static LOGGER: Logger = Logger {
    id: OnceLock::new(),
    output: Mutex::new(Output {
        sink: None,
        show_level: false,
        show_origin: false,
        module: None,
    }),
    missed: AtomicU64::new(0),
};

struct Logger {
    id: OnceLock<String>,
    output: Mutex<Output>,
    missed: AtomicU64,
}

struct Output {
    /// A file or FIFO; else standard output.
    sink: Option<LineSink>,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

impl Logger {
    fn output(&self) -> MutexGuard<'_, Output> {
        // Every state of the output is a good one.
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut output = self.output();
        if !output.shows(record) {
            return;
        }
        let id = self.id.get().map_or("", String::as_str);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = output.line(record, id, since_epoch);
        if output.append(&line).is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

impl Output {
    fn shows(&self, record: &Record<'_>) -> bool {
        let is_inside = |module: &String| record.module_path().is_some_and(|path| path.starts_with(module));
        self.module.as_ref().is_none_or(is_inside)
    }

    fn line(&self, record: &Record<'_>, id: &str, since_epoch: Duration) -> String {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("-");
        let mut line = format!("{} [{id}:{thread}", timestamp(since_epoch));
        let mut put = |part: std::fmt::Arguments<'_>| {
            line.write_fmt(part).expect("writing to a String cannot fail");
        };
        if self.show_level {
            put(format_args!(":{}", record.level()));
        }
        if self.show_origin {
            put(format_args!(
                ":{}:{}",
                record.file().unwrap_or("?"),
                record.line().unwrap_or(0)
            ));
        }
        put(format_args!("] {}", record.args()));
        line.truncate(line.floor_char_boundary(LINE_BYTES_MAX - 1));
        line.push('\n');
        line
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        match &mut self.sink {
            Some(sink) => sink.append(line.as_bytes()),
            None => write_to_stdout(line.as_bytes()),
        }
    }
}

/// Writes to standard output if it has room at once. It belongs to others too, so it cannot be
/// made nonblocking; but a pipe that polls as writable takes a whole line.
fn write_to_stdout(line: &[u8]) -> io::Result<()> {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::OUT)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    if poll(&mut fds, Some(&at_once))? == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    rustix::io::write(&stdout, line)?;
    Ok(())
}

/// Date and time of day in UTC, to the nanosecond.
fn timestamp(since_epoch: Duration) -> String {
    let now = UtcSecond(since_epoch.as_secs());
    let (year, month, day) = now.date();
    let (hour, minute, second) = now.time_of_day();
    let ns = since_epoch.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ns:09}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> Output {
        Output {
            sink: None,
            show_level: false,
            show_origin: false,
            module: None,
        }
    }

    fn record<'a>(message: std::fmt::Arguments<'a>) -> Record<'a> {
        let mut builder = Record::builder();
        builder
            .args(message)
            .level(log::Level::Warn)
            .module_path(Some("coracle_vmm::api"));
        builder.file(Some("vmm/src/api/server.rs")).line(Some(7));
        builder.build()
    }

    #[test]
    fn a_line_reads_as_firecrackers() {
        let thread = std::thread::current().name().unwrap_or("-").to_owned();
        let at = Duration::new(1_795_442_025, 383_079_419);
        let plain = output().line(&record(format_args!("hello")), "vm-1", at);
        assert_eq!(
            plain,
            format!("2026-11-23T13:53:45.383079419 [vm-1:{thread}] hello\n")
        );
        let full = Output {
            show_level: true,
            show_origin: true,
            ..output()
        };
        let line = full.line(&record(format_args!("hello")), "vm-1", at);
        assert!(
            line.ends_with(&format!("[vm-1:{thread}:WARN:vmm/src/api/server.rs:7] hello\n")),
            "{line}"
        );
    }

    #[test]
    fn a_long_line_is_cut() {
        let line = output().line(
            &record(format_args!("{}", "ä".repeat(5000))),
            "vm-1",
            Duration::ZERO,
        );
        assert!(line.len() <= LINE_BYTES_MAX && line.len() > LINE_BYTES_MAX - 4 && line.ends_with("ä\n"));
    }

    #[test]
    fn only_the_module_that_is_asked_for_is_shown() {
        let with = |module: &str| Output {
            module: Some(module.to_owned()),
            ..output()
        };
        let message = format_args!("x");
        assert!(with("coracle_vmm::api").shows(&record(message)));
        assert!(with("coracle_vmm").shows(&record(message)));
        assert!(!with("coracle_vmm::machine").shows(&record(message)));
        assert!(output().shows(&record(message)));
    }
}
