//! What `run` promises to somebody who sits at a terminal.
#![expect(unsafe_code, reason = "a process gets its terminal between fork and exec")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::ptr;
use std::sync::mpsc;
use std::thread;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::termios::{LocalModes, tcgetattr};

use crate::tests;
use crate::workbench::{LIMIT, Workbench, until};

tests![every_key_goes_to_the_guest_but_the_escape_and_the_terminal_is_restored];

/// A terminal with `coraclectl` at it.
pub(crate) struct Desk {
    keyboard: File,
    terminal: OwnedFd,
    child: Child,
}

impl Desk {
    pub(crate) fn sit_down(bench: &Workbench, arguments: &[&str]) -> Self {
        let (keyboard, terminal) = pseudo_terminal();
        let end = || Stdio::from(terminal.try_clone().expect("a descriptor is left"));
        let mut command = bench.command(arguments);
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: the closure makes system calls only; `Command` runs it between fork and exec.
        unsafe {
            command.pre_exec(|| {
                setsid()?;
                Ok(ioctl_tiocsctty(io::stdin())?)
            })
        };
        let child = command.spawn().expect("coraclectl starts");
        Self {
            keyboard: File::from(keyboard),
            terminal,
            child,
        }
    }

    /// All that the terminal has shown, once `coraclectl` has ended well.
    pub(crate) fn shown(mut self) -> String {
        let mut screen = self.keyboard.try_clone().expect("a descriptor is left");
        let reader = thread::spawn(move || {
            let (mut shown, mut bytes) = (Vec::new(), [0; 4096]);
            // The last descriptor of the other side is ours; closing it ends the reading, by EIO.
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                shown.extend_from_slice(&bytes[..count]);
            }
            shown
        });
        until("coraclectl ends", || {
            self.child.try_wait().expect("the child is ours").is_some()
        });
        let status = self.child.wait().expect("the child is ours");
        drop(self);
        let shown = reader.join().expect("the reader has not panicked");
        let shown = String::from_utf8_lossy(&shown).into_owned();
        assert!(status.success(), "{shown}");
        shown
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.terminal)
            .expect("the terminal is open")
            .local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        // Does nothing to a process that was waited for; its monitor dies with any other.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both sides of a new pseudo-terminal: the one that people use, and the one that programs see.
fn pseudo_terminal() -> (OwnedFd, OwnedFd) {
    let (mut keyboard, mut terminal) = (-1, -1);
    let none = ptr::null_mut();
    // SAFETY: both descriptors are written to our own variables; no name, modes or size are passed.
    let opened = unsafe {
        libc::openpty(
            &raw mut keyboard,
            &raw mut terminal,
            none,
            ptr::null(),
            ptr::null(),
        )
    };
    assert_eq!(opened, 0, "no pseudo-terminal: {}", io::Error::last_os_error());
    // SAFETY: `openpty` has just opened it, and nobody else knows it.
    let keyboard = unsafe { OwnedFd::from_raw_fd(keyboard) };
    // SAFETY: as above.
    let terminal = unsafe { OwnedFd::from_raw_fd(terminal) };
    // Processes that other tests start must not hold the terminal open.
    for side in [&keyboard, &terminal] {
        fcntl_setfd(side, FdFlags::CLOEXEC).expect("the descriptor is open");
    }
    (keyboard, terminal)
}

fn every_key_goes_to_the_guest_but_the_escape_and_the_terminal_is_restored() {
    let bench = Workbench::new();
    let mut desk = Desk::sit_down(&bench, &["run", "--kernel", "k", "--name", "echoes"]);
    until("the machine runs", || {
        bench.requests("echoes").contains("InstanceStart")
    });
    assert!(desk.is_raw());
    desk.keyboard
        .write_all(b"a\x03b\x01\x01c")
        .expect("the terminal is open");
    let mut screen = desk.keyboard.try_clone().expect("a descriptor is left");
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut shown = Vec::new();
        let mut byte = [0];
        // Ends with the terminal, if the guest's echo never comes.
        while !shown.ends_with(b"a\x03b\x01c") && screen.read_exact(&mut byte).is_ok() {
            shown.extend(byte);
        }
        // The test may have given up.
        let _ = sender.send(shown);
    });
    let shown = receiver
        .recv_timeout(LIMIT)
        .expect("the guest echoes what was typed");
    assert!(String::from_utf8_lossy(&shown).contains("Ctrl-A x stops the machine"));
    desk.keyboard.write_all(b"\x01x").expect("the terminal is open");
    until("coraclectl ends", || {
        desk.child.try_wait().expect("the child is ours").is_some()
    });
    let status = desk.child.wait().expect("the child is ours");
    assert_eq!(status.code(), Some(0));
    assert!(!desk.is_raw() && bench.is_clean());
}
