//! The one place where the `vmm` thread waits. A source only says that something happened: it reads
//! its descriptor and posts a [`Message`]; whoever drains the messages acts, with the only `&mut` to
//! everything.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

use coracle_devices::power::EndSignal;
use coracle_devices::virtio::blk::LossSignal;
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::timerfd::TimerFd;

use crate::end::Ending;
use crate::signals::{StopSignal, StopSignals};

/// How much of the console's input is read at once.
const CONSOLE_READ_BYTES: usize = 256;

/// What the loop waits on. Descriptors that are only named here belong to something that outlives the watch.
#[derive(Debug)]
pub enum Source {
    /// API calls have been queued.
    Calls(RawFd),
    /// The guest has ended itself.
    GuestEnd(Arc<EndSignal>, Ending),
    /// The machine has ended.
    Ending(Ending),
    /// Somebody wants the process to stop.
    Stop(StopSignals),
    /// Standard input has bytes for the guest.
    ConsoleInput,
    /// The serial port has room for input again, or output that waits.
    SerialAttention(RawFd),
    /// The descriptor that serial output goes to takes output again.
    SerialWritable(RawFd),
    /// Metrics are due.
    MetricsDue(TimerFd),
    /// Something that was begun has come further, or its time is over.
    Progress(RawFd),
    /// The timer that rings when a guest is to be told again.
    Reminder(RawFd),
    /// A disk is lost.
    Loss(Arc<LossSignal>),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Look at the queue of API calls.
    Calls,
    /// The machine has ended.
    Ended,
    /// A signal asks the process to stop.
    Stop(StopSignal),
    /// Something about the guest's console.
    Console(ConsoleEvent),
    /// Write the metrics.
    MetricsDue,
    /// Look after what was begun.
    Progress,
    /// Tell the guest again what it has not heard.
    Reminder,
    /// A disk serves nobody here any more.
    DiskLost {
        /// The drive.
        drive_id: String,
        /// Who has it.
        reason: String,
    },
}

/// What happened to the guest's console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// Bytes for the guest.
    Input(Vec<u8>),
    /// Standard input has ended, or cannot be read any more.
    InputClosed,
    /// The port has room for input again, or output that waits.
    Attention,
    /// The output's descriptor takes output again.
    Writable,
}

type Inbox = Rc<RefCell<VecDeque<Message>>>;

struct Subscriber {
    source: Source,
    inbox: Inbox,
}

/// Waits for all sources at once.
pub struct EventLoop {
    manager: EventManager<Subscriber>,
    inbox: Inbox,
}

/// Names a watched source.
pub type Watch = SubscriberId;

impl EventLoop {
    /// A loop without sources.
    ///
    /// # Errors
    ///
    /// When the host has no epoll instance to give.
    pub fn new() -> Result<Self, event_manager::Error> {
        Ok(Self {
            manager: EventManager::new()?,
            inbox: Inbox::default(),
        })
    }

    /// Starts to watch `source`.
    pub fn watch(&mut self, source: Source) -> Watch {
        self.manager.add_subscriber(Subscriber {
            source,
            inbox: Rc::clone(&self.inbox),
        })
    }

    /// Stops watching; the source is dropped.
    pub fn unwatch(&mut self, watch: Watch) {
        // Dropping the subscriber also takes its descriptors out of epoll; an unknown one is gone already.
        let _ = self.manager.remove_subscriber(watch);
    }

    /// Waits until there is a message, and hands out the oldest.
    ///
    /// # Errors
    ///
    /// When epoll fails, which no source can cause.
    pub fn wait(&mut self) -> Result<Message, event_manager::Error> {
        loop {
            if let Some(message) = self.inbox.borrow_mut().pop_front() {
                return Ok(message);
            }
            match self.manager.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Source {
    fn descriptor(&self) -> (RawFd, EventSet) {
        match self {
            Self::Calls(fd) | Self::SerialAttention(fd) | Self::Progress(fd) | Self::Reminder(fd) => {
                (*fd, EventSet::IN)
            }
            Self::Loss(loss) => (loss.as_fd().as_raw_fd(), EventSet::IN),
            Self::GuestEnd(signal, _) => (signal.as_fd().as_raw_fd(), EventSet::IN),
            Self::Ending(ending) => (ending.bell().as_raw_fd(), EventSet::IN),
            Self::Stop(signals) => (signals.as_raw_fd(), EventSet::IN),
            Self::ConsoleInput => (rustix::stdio::stdin().as_raw_fd(), EventSet::IN),
            Self::SerialWritable(fd) => (*fd, EventSet::OUT),
            Self::MetricsDue(timer) => (timer.as_raw_fd(), EventSet::IN),
        }
    }

    /// Says what happened. What the descriptor counts is read here, or by whoever acts on the message.
    fn read(&mut self) -> Option<Message> {
        match self {
            Self::Calls(_) => Some(Message::Calls),
            Self::GuestEnd(signal, ending) => {
                ending.announce(signal.end()?.into());
                None
            }
            Self::Ending(ending) => ending.bell().read().ok().map(|_| Message::Ended),
            Self::Stop(signals) => signals.arrived().map(Message::Stop),
            Self::ConsoleInput => Some(Message::Console(read_console())),
            Self::SerialAttention(_) => Some(Message::Console(ConsoleEvent::Attention)),
            Self::SerialWritable(_) => Some(Message::Console(ConsoleEvent::Writable)),
            Self::MetricsDue(timer) => timer.wait().ok().map(|_| Message::MetricsDue),
            Self::Progress(_) => Some(Message::Progress),
            Self::Reminder(_) => Some(Message::Reminder),
            Self::Loss(loss) => {
                loss.heard();
                loss.reason().map(|reason| Message::DiskLost {
                    drive_id: loss.drive_id().to_owned(),
                    reason: reason.to_owned(),
                })
            }
        }
    }
}

fn read_console() -> ConsoleEvent {
    let mut bytes = vec![0; CONSOLE_READ_BYTES];
    match rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
        Ok(0) => ConsoleEvent::InputClosed,
        Ok(len) => {
            bytes.truncate(len);
            ConsoleEvent::Input(bytes)
        }
        Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => ConsoleEvent::Input(Vec::new()),
        Err(_) => ConsoleEvent::InputClosed,
    }
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        if let Some(message) = self.source.read() {
            self.inbox.borrow_mut().push_back(message);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let (fd, events) = self.source.descriptor();
        if let Err(error) = ops.add(Events::new_raw(fd, events)) {
            // A regular file and /dev/null are always ready and cannot be watched (EPERM): there is
            // nothing to wait for.
            log::debug!("{:?} cannot be watched: {error}", self.source);
        }
    }
}
