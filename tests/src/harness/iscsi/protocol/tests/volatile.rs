//! What the proxy acknowledges is seen by reads, safe after a flush, and gone after a crash.

use std::process::{Command, Stdio};

use super::*;
use crate::console::Console;

const SECTORS: usize = 64;

fn volatile(target: &Target) -> Proxy {
    Proxy::volatile(HERE, target.address(), Seed::from(1), Iscsi::default()).expect("a free port")
}

/// A session in which the target has taken a write: from now on the cache does.
fn proven(proxy: &Proxy, digests: Digests) -> Initiator {
    let mut initiator = Initiator::login(proxy.address(), digests);
    assert_eq!(initiator.write(1000, &[1; BLOCK_BYTES]).status, GOOD);
    initiator
}

#[test]
fn a_write_is_not_on_the_target_before_a_flush_and_is_after_it() {
    let target = target();
    for digests in [NONE, BOTH] {
        let proxy = volatile(&target);
        let fill = if digests.data { 5 } else { 4 };
        let before = image(&target, 0, 8);
        let mut initiator = proven(&proxy, digests);
        for block in 0..8 {
            assert_eq!(initiator.write(block, &[fill; BLOCK_BYTES]).status, GOOD);
        }
        assert_eq!(image(&target, 0, 8), before);
        assert_eq!(initiator.flush().status, GOOD);
        assert_eq!(image(&target, 0, 8), [fill; 8 * BLOCK_BYTES]);
        // And the session goes on: its numbers agree on both sides.
        for _ in 0..20 {
            assert_eq!(initiator.write(0, &[fill; BLOCK_BYTES]).status, GOOD);
            assert_eq!(initiator.read(0, 1).data, [fill; BLOCK_BYTES]);
        }
    }
}

#[test]
fn a_crash_forgets_what_was_not_flushed_and_says_how_many_writes() {
    let target = target();
    let proxy = volatile(&target);
    let mut initiator = proven(&proxy, BOTH);
    initiator.write(0, &[1; BLOCK_BYTES]);
    initiator.flush();
    for block in 0..5 {
        assert_eq!(initiator.write(block, &[2; BLOCK_BYTES]).status, GOOD);
    }
    assert_eq!(proxy.crash().expect("it runs"), 5);
    assert!(initiator.receive_any().is_err(), "the session is gone");
    assert_eq!(image(&target, 0, 1), [1; BLOCK_BYTES]);
    assert_eq!(image(&target, 1, 4), [0; 4 * BLOCK_BYTES]);
    let mut again = Initiator::login(proxy.address(), BOTH);
    assert_eq!(again.read(0, 1).data, [1; BLOCK_BYTES]);
}

#[test]
fn a_forced_write_is_on_the_target_when_it_is_acknowledged() {
    let target = target();
    let proxy = volatile(&target);
    let mut initiator = proven(&proxy, NONE);
    initiator.write(3, &[1; BLOCK_BYTES]);
    let mut forced = write(4, &[2; BLOCK_BYTES]);
    forced[1] = FUA;
    assert_eq!(initiator.command(&forced, &[2; BLOCK_BYTES], 0).status, GOOD);
    assert_eq!(image(&target, 4, 1), [2; BLOCK_BYTES]);
    assert_eq!(
        image(&target, 3, 1),
        [0; BLOCK_BYTES],
        "another block is still held"
    );
    assert_eq!(proxy.crash().expect("it runs"), 1);
}

#[test]
fn an_unmap_comes_after_the_write_that_it_undoes() {
    let target = target();
    let proxy = volatile(&target);
    let mut initiator = proven(&proxy, NONE);
    initiator.write(3, &[1; BLOCK_BYTES]);
    let (cdb, parameters) = unmap(3);
    assert_eq!(initiator.command(&cdb, &parameters, 0).status, GOOD);
    assert_eq!(initiator.read(3, 1).data, [0; BLOCK_BYTES]);
    assert_eq!(initiator.flush().status, GOOD);
    assert_eq!(image(&target, 3, 1), [0; BLOCK_BYTES]);
}

#[test]
fn a_write_that_the_target_refuses_is_refused() {
    const RESERVATION_CONFLICT: u8 = 0x18;
    let target = target();
    let proxy = volatile(&target);
    let mut loser = proven(&proxy, NONE);
    assert_eq!(loser.write(1, &[1; BLOCK_BYTES]).status, GOOD);
    let mut holder = Initiator::login(proxy.address(), NONE);
    let (cdb, parameters) = register(7);
    assert_eq!(holder.command(&cdb, &parameters, 0).status, GOOD);
    let mut reserve = [0; 24];
    reserve[7] = 7;
    let cdb = [0x5f, 0x01, 0x01, 0, 0, 0, 0, 0, 24, 0];
    assert_eq!(holder.command(&cdb, &reserve, 0).status, GOOD);
    // What was acknowledged before the reservation is there, and nothing after it.
    assert_eq!(image(&target, 1, 1), [1; BLOCK_BYTES]);
    let refused = loser.write(1, &[2; BLOCK_BYTES]).status;
    assert!(
        matches!(refused, CHECK_CONDITION | RESERVATION_CONFLICT),
        "{refused:#x}"
    );
    assert_eq!(loser.write(1, &[2; BLOCK_BYTES]).status, RESERVATION_CONFLICT);
    assert_eq!(image(&target, 1, 1), [1; BLOCK_BYTES]);
    assert_eq!(holder.write(1, &[3; BLOCK_BYTES]).status, GOOD);
    assert_eq!(holder.write(2, &[3; BLOCK_BYTES]).status, GOOD);
    assert_eq!(proxy.crash().expect("it runs"), 1);
}

/// Random writes, reads, flushes and crashes: a read sees the newest, a flush makes it safe, a crash takes no flushed one.
#[test]
fn reads_flushes_and_crashes_agree_with_a_model_of_the_disk() {
    let target = target();
    for number in 1..=8 {
        let mut seed = Seed::from(number);
        let digests = if number % 2 == 0 { BOTH } else { NONE };
        let proxy = volatile(&target);
        let mut initiator = proven(&proxy, digests);
        let mut newest = image(&target, 0, SECTORS);
        // What each sector may hold after a crash: what was safe, and all since then.
        let mut possible: Vec<Vec<u8>> = newest.chunks(BLOCK_BYTES).map(|sector| vec![sector[0]]).collect();
        for step in 0..250 {
            let first = usize::try_from(seed.below(SECTORS as u64)).expect("small");
            let count = usize::try_from(1 + seed.below(8))
                .expect("small")
                .min(SECTORS - first);
            let range = first * BLOCK_BYTES..(first + count) * BLOCK_BYTES;
            let (block, blocks) = (u32::try_from(first), u16::try_from(count));
            let (block, blocks) = (block.expect("small"), blocks.expect("small"));
            match seed.below(20) {
                0 => {
                    assert_eq!(initiator.flush().status, GOOD);
                    assert_eq!(image(&target, 0, SECTORS), newest, "seed {number} step {step}");
                    possible = newest.chunks(BLOCK_BYTES).map(|sector| vec![sector[0]]).collect();
                }
                1 => {
                    proxy.crash().expect("it runs");
                    newest = image(&target, 0, SECTORS);
                    let found = newest.chunks(BLOCK_BYTES).zip(&mut possible);
                    for (sector, possible) in found {
                        assert!(possible.contains(&sector[0]), "seed {number} step {step}");
                        *possible = vec![sector[0]];
                    }
                    initiator = proven(&proxy, digests);
                }
                2..=8 => {
                    let found = initiator.read(block, blocks).data;
                    assert!(found == newest[range], "seed {number} step {step}");
                }
                _ => {
                    let fill = u8::try_from(seed.below(256)).expect("a byte");
                    newest[range.clone()].fill(fill);
                    possible[first..first + count]
                        .iter_mut()
                        .for_each(|p| p.push(fill));
                    let data = vec![fill; range.len()];
                    assert_eq!(initiator.write(block, &data).status, GOOD);
                }
            }
        }
    }
}

#[test]
fn what_qemu_writes_and_does_not_flush_is_lost_in_a_crash() {
    let target = target();
    let proxy = volatile(&target);
    let url = super::super::super::target::url(proxy.address(), 1);
    let mut qemu = Command::new("stdbuf");
    qemu.args(["-oL", "qemu-io", "-t", "writeback", "-f", "raw", &url]);
    let commands = [
        "write -P 1 0 4k",
        "write -P 2 4k 4k",
        "read -P 2 4k 4k",
        "flush",
        "write -P 3 8k 4k",
    ];
    for command in commands.iter().chain(&["sleep 20000"]) {
        qemu.args(["-c", command]);
    }
    let piped = qemu.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut qemu = piped.expect("QEMU is there");
    let said = Console::read(qemu.stdout.take().expect("it was asked for"));
    let written = said.wait_for("bytes at offset 8192", SOON);
    let forgotten = proxy.crash();
    // It would connect again.
    qemu.kill().expect("it sleeps");
    qemu.wait().expect("it is dead");
    written.expect("it writes");
    assert_eq!(forgotten.expect("it runs"), 1);
    assert_eq!(image(&target, 0, 8), [1; 4096]);
    assert_eq!(image(&target, 8, 8), [2; 4096]);
    assert_eq!(image(&target, 16, 8), [0; 4096]);
}
