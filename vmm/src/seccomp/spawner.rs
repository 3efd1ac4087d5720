//! The thread that makes all others.

use std::io;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, JoinHandle};

use coracle_storage::threads::Order;

type Made = io::Result<JoinHandle<()>>;
/// What is wanted, and by whom.
type Wanted = (Order, SyncSender<Made>);

static ORDERS: OnceLock<Mutex<Sender<Wanted>>> = OnceLock::new();

const SPAWNER_LIVES: &str = "the spawner lives as long as the process";

/// Starts it.
pub(super) fn start() -> io::Result<()> {
    let (orders, inbox) = channel::<Wanted>();
    thread::Builder::new().name("spawner".to_owned()).spawn(move || {
        super::trap::name_thread("spawner");
        while let Ok((order, answer)) = inbox.recv() {
            // Whoever wants it waits for it.
            let _ = answer.send(confined(order).make());
        }
    })?;
    assert!(ORDERS.set(Mutex::new(orders)).is_ok(), "there is one spawner");
    Ok(())
}

/// Has it make a thread.
pub(super) fn make(order: Order) -> Made {
    let orders = ORDERS.get().expect(SPAWNER_LIVES);
    let (answer, made) = sync_channel(1);
    let sent = orders.lock().expect(SPAWNER_LIVES).send((order, answer));
    sent.expect(SPAWNER_LIVES);
    made.recv().expect(SPAWNER_LIVES)
}

/// The same, with the filter of its kind on it before it does anything.
fn confined(order: Order) -> Order {
    let Order {
        kind,
        name,
        stack_bytes,
        work,
    } = order;
    let called = name.clone();
    Order {
        kind,
        name,
        stack_bytes,
        work: Box::new(move || {
            // The first thread has one already, so that the kernel takes them.
            super::confine(kind, &called).expect("the kernel takes what is narrower");
            work();
        }),
    }
}
