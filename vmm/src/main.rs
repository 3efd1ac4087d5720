//! `coracle`: one process, one virtual machine.

use std::path::Path;
use std::process::ExitCode;

use coracle_vmm::api::{mailbox, server};
use coracle_vmm::config::Config;
use coracle_vmm::end::{EXIT_BAD_CONFIGURATION, EXIT_FAILURE};
use coracle_vmm::kvm::vcpu::install_kick_handler;
use coracle_vmm::monitor::Monitor;
use coracle_vmm::signals::StopSignals;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("coracle: {error}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn run(arguments: &[String]) -> Result<u8, Box<dyn std::error::Error>> {
    let value = |flag: &str| arguments.iter().skip_while(|word| *word != flag).nth(1).cloned();
    let stop = StopSignals::take_over()?;
    install_kick_handler()?;
    let config = match value("--config-file") {
        Some(path) => Config::from_file(Path::new(&path))?,
        None => Config::default(),
    };
    let starts = value("--config-file").is_some();
    let id = value("--id").unwrap_or_else(|| "anonymous-instance".to_owned());
    let mut monitor = Monitor::new(id, config, stop)?;
    let (inbox, calls) = mailbox()?;
    let _server = if arguments.iter().any(|word| word == "--no-api") {
        None
    } else {
        let path = value("--api-sock").unwrap_or_else(|| "/run/firecracker.socket".to_owned());
        let socket = server::Socket::bind(Path::new(&path))?;
        Some(server::Server::start(socket, server::Limits::default(), inbox)?)
    };
    monitor.answer(calls);
    if starts && let Err(fault) = monitor.execute(coracle_vmm::api::Verb::Start) {
        eprintln!("coracle: {}", fault.message);
        return Ok(EXIT_BAD_CONFIGURATION);
    }
    let end = monitor.serve()?;
    eprintln!("coracle: {end}");
    monitor.retire();
    Ok(end.status())
}
