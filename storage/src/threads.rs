//! Threads, by what they are for: that decides what a thread may ask of the kernel.
//!
//! A filter of system calls is inherited by the threads that a thread makes, and can only become narrower. So threads are made by
//! whoever has registered for it ([`make_by`]), and not by those that want them; until then, and in tests, each makes its own.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// It answers clients of the API.
    Api,
    /// It runs a virtual processor.
    Vcpu,
    /// It serves a disk by io_uring.
    Io,
    /// The same for a disk on a network.
    NetworkIo,
    /// The same for one whose lease has its records in a directory.
    RecordingIo,
    /// It serves a disk by system calls that wait.
    PlainIo,
    /// The same for a disk on a network.
    PlainNetworkIo,
    /// It gives the guest random bytes.
    Entropy,
    /// It moves frames between the guest and a tap.
    Net,
    /// It moves streams between the guest and sockets of the host.
    Vsock,
    /// It gives memory that the guest does not need back to the host.
    Balloon,
    /// It lets the guest reach memory that comes, and gives back what goes.
    Memory,
    /// It puts what the guest has stored in persistent memory on the medium.
    Pmem,
    /// It brings guest memory in where the guest waits for it.
    Pager,
    /// It opens, copies, sends or receives: whatever takes as long as a server does.
    Mover,
}

impl Kind {
    /// Each of them.
    pub const ALL: [Self; 15] = [
        Self::Api,
        Self::Vcpu,
        Self::Io,
        Self::NetworkIo,
        Self::RecordingIo,
        Self::PlainIo,
        Self::PlainNetworkIo,
        Self::Entropy,
        Self::Net,
        Self::Vsock,
        Self::Balloon,
        Self::Memory,
        Self::Pmem,
        Self::Pager,
        Self::Mover,
    ];

    /// What its filter is called in a policy.
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Vcpu => "vcpu",
            Self::Io => "io",
            Self::NetworkIo => "io_network",
            Self::RecordingIo => "io_recording",
            Self::PlainIo => "io_plain",
            Self::PlainNetworkIo => "io_plain_network",
            Self::Entropy => "entropy",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
            Self::Memory => "memory",
            Self::Pmem => "pmem",
            Self::Pager => "pager",
            Self::Mover => "mover",
        }
    }
}

/// A thread that is to be made.
pub struct Order {
    /// What it is for.
    pub kind: Kind,
    /// What it is called.
    pub name: String,
    /// How large its stack is, if that matters.
    pub stack_bytes: Option<usize>,
    /// What it does.
    pub work: Box<dyn FnOnce() + Send>,
}

/// Who makes threads.
pub type Maker = fn(Order) -> io::Result<JoinHandle<()>>;

static MAKER: OnceLock<Maker> = OnceLock::new();

/// From now on all threads are made by `maker`.
///
/// # Panics
///
/// When that was said before.
pub fn make_by(maker: Maker) {
    assert!(MAKER.set(maker).is_ok(), "one maker makes all threads");
}

/// Makes a thread of that kind and name.
///
/// # Errors
///
/// When the host has none to give.
pub fn spawn<T: Send + 'static>(
    kind: Kind,
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Thread<T>> {
    spawn_with_stack(kind, name, None, work)
}

/// The same with a stack of that size.
///
/// # Errors
///
/// As [`spawn`].
pub fn spawn_with_stack<T: Send + 'static>(
    kind: Kind,
    name: impl Into<String>,
    stack_bytes: Option<usize>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Thread<T>> {
    let left = Arc::<Mutex<Option<T>>>::default();
    let place = Arc::clone(&left);
    let order = Order {
        kind,
        name: name.into(),
        stack_bytes,
        work: Box::new(move || {
            let value = work();
            *place.lock().expect(NO_PANIC) = Some(value);
        }),
    };
    let maker = MAKER.get().copied().unwrap_or(Order::make);
    Ok(Thread {
        handle: maker(order)?,
        left,
    })
}

impl Order {
    /// Makes the thread, which is a child of this one.
    ///
    /// # Errors
    ///
    /// When the host has none to give.
    pub fn make(self) -> io::Result<JoinHandle<()>> {
        let mut builder = thread::Builder::new().name(self.name);
        if let Some(bytes) = self.stack_bytes {
            builder = builder.stack_size(bytes);
        }
        builder
            .spawn(self.work)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EAGAIN) => io::Error::new(error.kind(), NONE_LEFT),
                _ => error,
            })
    }
}

/// A thread that was made; dropped, it goes on by itself.
#[derive(Debug)]
pub struct Thread<T> {
    handle: JoinHandle<()>,
    left: Arc<Mutex<Option<T>>>,
}

/// What EAGAIN says of a thread.
const NONE_LEFT: &str = "the host gives this process no more threads: look at the limits on processes (`pids.max` of its \
                         cgroup, `ulimit -u`)";

const NO_PANIC: &str = "nobody panics while it is put down";

impl<T> Thread<T> {
    /// Waits for its end, and has what it has left.
    ///
    /// # Errors
    ///
    /// With what it has panicked.
    ///
    /// # Panics
    ///
    /// Never: a thread that has not panicked leaves something.
    pub fn join(self) -> thread::Result<T> {
        self.handle.join()?;
        Ok(self
            .left
            .lock()
            .expect(NO_PANIC)
            .take()
            .expect("a thread that has not panicked leaves something"))
    }

    /// The thread itself, for whoever sends it signals.
    pub fn handle(&self) -> &JoinHandle<()> {
        &self.handle
    }

    /// Whether it has come to its end.
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_its_name_and_leaves_what_it_has_found() {
        let thread = spawn(Kind::Mover, "a name", || {
            thread::current().name().map(ToOwned::to_owned)
        });
        assert_eq!(thread.unwrap().join().unwrap().as_deref(), Some("a name"));
        let thread = spawn_with_stack(Kind::Vcpu, "another", Some(64 << 10), || 7).unwrap();
        assert_eq!(thread.join().unwrap(), 7);
    }

    #[test]
    fn what_a_thread_has_panicked_with_is_told() {
        let thread = spawn::<()>(Kind::Io, "panics", || std::panic::resume_unwind(Box::new(5_u8)));
        let told = thread.unwrap().join().unwrap_err();
        assert_eq!(told.downcast_ref(), Some(&5_u8));
    }
}
