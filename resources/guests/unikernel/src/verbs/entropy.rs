//! `rng`: bytes of an entropy source.

use instrument::cmdline::Command;
use instrument::width::{low32, size};

use super::Failure;
use crate::machine::Machine;
use crate::say;
use crate::virtio::rng::Entropy;

/// The largest single request.
const REQUEST_BYTES_MAX: u64 = 65536;
/// So many random bytes are not all the same: it would take 2^120 tries.
const SAMPLE_BYTES: usize = 16;

/// Reads bytes, and finds them neither missing nor all the same.
pub fn rng(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["dev", "bytes", "wait"])?;
    let wait = machine.wait(command)?;
    let bytes = command.number("bytes", 64)?;
    let mut source = Entropy::open(machine, command.number("dev", 0)?)?;
    wait.prepare(&source.transport, 1)?;
    let mut buffer = machine.memory.allocate(size(REQUEST_BYTES_MAX))?;
    let mut left = bytes;
    let mut requests = 0u64;
    while left > 0 {
        buffer.bytes_mut().fill(0);
        let wanted = left.min(REQUEST_BYTES_MAX);
        let written = u64::from(source.fill(buffer.address(), low32(wanted), &wait)?);
        if written == 0 || written > wanted {
            return Err(Failure::Check(
                "the source returned no bytes, or more than there was room for",
            ));
        }
        check(buffer.bytes_mut(), size(written))?;
        left -= written;
        requests += 1;
    }
    source.transport.reset()?;
    say!("rng: ok bytes={bytes} requests={requests}\n");
    Ok(())
}

/// Whether `written` bytes look random, and nothing behind them was touched.
fn check(bytes: &[u8], written: usize) -> Result<(), Failure> {
    let Some((random, rest)) = bytes.split_at_checked(written) else {
        return Ok(());
    };
    if rest.iter().any(|&byte| byte != 0) {
        return Err(Failure::Check("the source wrote more than it says"));
    }
    match random.split_first() {
        Some((first, others)) if random.len() >= SAMPLE_BYTES && others.iter().all(|byte| byte == first) => {
            Err(Failure::Check("all bytes are the same"))
        }
        _ => Ok(()),
    }
}
