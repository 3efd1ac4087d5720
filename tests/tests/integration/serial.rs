//! The serial port carries both directions, and never holds the guest up.

use std::process::Stdio;
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::Machine;
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::json;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "what_is_typed_comes_back",
        need: Need::Kvm,
        run: what_is_typed_comes_back,
    },
    Case {
        name: "a_long_line_typed_at_once_arrives_whole",
        need: Need::Kvm,
        run: a_long_line_arrives_whole,
    },
    Case {
        name: "a_closed_standard_input_is_no_end",
        need: Need::Kvm,
        run: a_closed_standard_input_is_no_end,
    },
    Case {
        name: "a_blocked_pipe_does_not_stall_the_guest",
        need: Need::Kvm,
        run: a_blocked_pipe_does_not_stall,
    },
    Case {
        name: "a_closed_pipe_does_not_end_the_guest",
        need: Need::Kvm,
        run: a_closed_pipe_does_not_end_the_guest,
    },
    Case {
        name: "output_goes_to_a_file_where_asked",
        need: Need::Kvm,
        run: output_goes_to_a_file_where_asked,
    },
];

const SOON: Duration = Duration::from_secs(30);

fn what_is_typed_comes_back(context: &Context) -> Outcome {
    for wait in ["poll", "irq"] {
        let machine = Machine::unikernel(&context.environment, &format!("do=echo:wait={wait}"));
        let mut monitor = Launch::new(&context.environment)?
            .config(&machine.config())?
            .start()?;
        monitor.console.wait_for("echo: ready", SOON)?;
        for line in ["first", "second line", "third"] {
            monitor.type_in(format!("{line}\n").as_bytes())?;
            monitor
                .console
                .wait_for(&format!("echo: {line}"), SOON)
                .map_err(|e| format!("{wait}: {e:?}"))?;
        }
        monitor.type_in(b"exit 9\n")?;
        monitor.wait(SOON)?.expect(9)?;
    }
    Ok(())
}

fn a_long_line_arrives_whole(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=echo:wait=irq");
    let mut monitor = Launch::new(&context.environment)?
        .config(&machine.config())?
        .start()?;
    monitor.console.wait_for("echo: ready", SOON)?;
    // More than the FIFO's 16 and the 64 of the largest UART, within the guest's line.
    let line: String = ('a'..='z').cycle().take(100).collect();
    monitor.type_in(format!("{line}\nexit 0\n").as_bytes())?;
    monitor.console.wait_for(&format!("echo: {line}"), SOON)?;
    monitor.wait(SOON)?.expect(0)
}

fn a_closed_standard_input_is_no_end(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=50,count=10 do=exit:status=6");
    let mut monitor = Launch::new(&context.environment)?
        .config(&machine.config())?
        .start()?;
    monitor.close_input();
    monitor.console.wait_for("tick: n=5", SOON)?;
    let spent = monitor.process().cpu_time()?;
    // The guest is busy with one CPU; a monitor that spins on the closed descriptor takes a second one.
    ensure!(spent < Duration::from_secs(5), "{spent:?}");
    monitor.wait(SOON)?.expect(6)
}

fn a_blocked_pipe_does_not_stall(context: &Context) -> Outcome {
    // 4000 lines of 25 bytes and more, into a pipe that holds 64 KiB and is not read.
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=0,count=4000 do=exit:status=8");
    let launch = Launch::new(&context.environment)?.without_api();
    let (mut command, _kept) = launch.config(&machine.config())?.command()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + SOON * 2;
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.code() == Some(8), "{status}");
            return Ok(());
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err("the guest waits for whoever does not read its console".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn a_closed_pipe_does_not_end_the_guest(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=50 do=exit:status=8");
    let launch = Launch::new(&context.environment)?.without_api();
    let (mut command, _kept) = launch.config(&machine.config())?.command()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    drop(child.stdout.take());
    let status = child.wait()?;
    ensure!(status.code() == Some(8), "{status}");
    Ok(())
}

fn output_goes_to_a_file_where_asked(context: &Context) -> Outcome {
    let kept = tempfile::tempdir()?;
    let file = kept.path().join("serial");
    std::fs::write(&file, "")?;
    let machine = Machine::unikernel(&context.environment, "do=hello")
        .part("serial", json!({ "serial_out_path": file }));
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&machine.config())?;
    monitor.start_instance()?;
    let ended = monitor.wait(SOON)?;
    ended.expect(0)?;
    let text = std::fs::read_to_string(&file)?;
    ensure!(
        text.contains("hello from the unikernel guest"),
        "the file has: {text}"
    );
    ensure!(
        !ended.console.contains("hello"),
        "and standard output too: {}",
        ended.console
    );
    Ok(())
}
