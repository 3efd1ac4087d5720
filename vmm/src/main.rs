//! `coracle`: one process, one virtual machine.
#![no_main]
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "the program's last words go to its caller"
)]

use std::error::Error;
use std::ffi::{c_char, c_int};
use std::path::PathBuf;

use coracle_vmm::api::server::{Limits, Server, Socket};
use coracle_vmm::api::{chain, mailbox};
use coracle_vmm::cli::{self, Arguments, CliError};
use coracle_vmm::config::{self, Config};
use coracle_vmm::end::{EXIT_BAD_ARGUMENT, EXIT_BAD_CONFIGURATION, EXIT_FAILURE, EXIT_OK};
use coracle_vmm::keys::TrustedKeys;
use coracle_vmm::kvm::vcpu::install_kick_handler;
use coracle_vmm::kvm::vm;
use coracle_vmm::landlock::{self, Reach};
use coracle_vmm::logger;
use coracle_vmm::metrics::Registry;
use coracle_vmm::monitor::Monitor;
use coracle_vmm::process;
use coracle_vmm::seccomp;
use coracle_vmm::signals::StopSignals;

/// Where the C library begins, instead of the standard library's own beginning: that has a handler for stacks that are full, for
/// which each thread would need a second stack, and filters that allow it. A full stack ends the process by SIGSEGV as it is.
#[expect(unsafe_code, reason = "the C library calls it by this name")]
// SAFETY: no other function of this program has this name.
#[unsafe(no_mangle)]
extern "C" fn main(_: c_int, _: *const *const c_char) -> c_int {
    if let Err(error) = process::begin() {
        eprintln!("coracle: the process cannot begin: {error}");
        std::process::exit(i32::from(EXIT_FAILURE));
    }
    std::process::exit(i32::from(run_by_arguments()))
}

fn run_by_arguments() -> u8 {
    let arguments = match cli::parse(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(error) if error.exit_status() == 0 => {
            print!("{error}");
            return EXIT_OK;
        }
        Err(error) => {
            let text = chain(&error);
            // What is wrong with the words comes with its own prefix, hint and line feed.
            match error {
                CliError::Syntax { .. } => eprint!("{text}"),
                _ => eprintln!("coracle: {text}"),
            }
            return error.exit_status();
        }
    };
    let has_log_file = arguments.logger.log_path.is_some();
    match run(arguments) {
        Ok(status) => status,
        Err(failure) => {
            eprintln!("coracle: {}", failure.text);
            // A daemon's standard error is nowhere.
            if has_log_file {
                log::error!("{}", failure.text);
            }
            failure.status
        }
    }
}

/// Why the process ends without a guest having ended.
struct Failure {
    status: u8,
    text: String,
}

impl Failure {
    fn new(status: u8) -> impl Fn(&dyn Error) -> Self {
        move |error| Self {
            status,
            text: chain(error),
        }
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(EXIT_FAILURE)(&error)
    }
}

fn run(arguments: Arguments) -> Result<u8, Failure> {
    process::meet_supervisor().map_err(|error| Failure::new(EXIT_BAD_ARGUMENT)(&error))?;
    vm::make_room_for_descriptors();
    // Before any thread: those inherit what is blocked.
    let stop = StopSignals::take_over()?;
    install_kick_handler()?;
    logger::install(&arguments.id)?;
    logger::configure(&arguments.logger)?;
    let mut config = match &arguments.config_file {
        Some(path) => {
            Config::from_file(path).map_err(|error| Failure::new(EXIT_BAD_CONFIGURATION)(&error))?
        }
        None => Config::default(),
    };
    if arguments.boot_timer {
        config.add_boot_timer();
    }
    let read = |path: &PathBuf| config::read_metadata(path, arguments.metadata_bytes_max);
    let metadata = arguments.metadata.as_ref().map(read).transpose();
    let metadata = metadata.map_err(|error| Failure::new(EXIT_BAD_CONFIGURATION)(&error))?;
    if arguments.landlock {
        confine(&arguments, &config)?;
    }
    seccomp::begin(&arguments.filters).map_err(|error| Failure::new(EXIT_BAD_CONFIGURATION)(&error))?;
    config.take_over(arguments.takes_over);
    let mut monitor = Monitor::new(arguments.id, config, stop, Registry::default())?;
    monitor.limit_metadata(arguments.metadata_bytes_max);
    if let Some(metadata) = metadata {
        told(monitor.put_metadata(metadata), EXIT_BAD_CONFIGURATION)?;
    }
    if let Some(path) = &arguments.trusted_keys {
        let keys = TrustedKeys::read(path);
        monitor.trust_only(keys.map_err(|error| Failure::new(EXIT_BAD_CONFIGURATION)(&error))?);
    }
    if let Some(metrics) = arguments.metrics {
        told(monitor.write_metrics_to(metrics), EXIT_FAILURE)?;
    }
    let server = match &arguments.api_sock {
        Some(path) => {
            let (inbox, calls) = mailbox()?;
            let limits = Limits {
                body_bytes_max: arguments.body_bytes_max,
                ..Limits::default()
            };
            let server = Server::start(Socket::bind(path)?, limits, inbox)?;
            monitor.answer(calls, &server, arguments.start_times);
            Some(server)
        }
        None => None,
    };
    if arguments.config_file.is_some() {
        told(monitor.apply_and_start(), EXIT_BAD_CONFIGURATION)?;
    }
    let end = monitor.serve()?;
    eprintln!("coracle: {end}");
    log::info!("{end}");
    monitor.retire();
    drop(server);
    Ok(end.status())
}

/// Lets the process reach the files that it is configured with, and no others, where all of them are known now.
fn confine(arguments: &Arguments, config: &Config) -> Result<(), Failure> {
    if arguments.api_sock.is_some() {
        return Ok(landlock::begin_without()?);
    }
    let files = [arguments.trusted_keys.as_deref(), arguments.filters.path()];
    let metrics = arguments.metrics.as_ref();
    let metrics = metrics.map(|metrics| metrics.metrics_path.as_path());
    Ok(landlock::begin(&Reach::of(
        config,
        files.into_iter().flatten(),
        metrics,
    ))?)
}

fn told<T>(answer: Result<T, coracle_vmm::api::Fault>, status: u8) -> Result<T, Failure> {
    answer.map_err(|fault| Failure {
        status,
        text: fault.message,
    })
}
