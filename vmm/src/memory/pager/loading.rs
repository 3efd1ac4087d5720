//! What the pager's thread does.

use std::collections::VecDeque;
use std::error::Error;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use coracle_storage::open;
use coracle_storage::pipeline::PreparedPipeline;

use super::orders::{Order, OrderInbox};
use super::{END_MS_MAX, Guarded, Progress, Remains};
use crate::api::chain;
use crate::end::{End, Ending};
use crate::memory::chunk::Pages;
use crate::memory::places::Places;
use crate::memory::reading::{CheckedChunk, ChunkReader, DEPTH, Read, Saved, saved_chunks};
use crate::memory::userfault::{HostRange, Userfault};
use crate::memory::working_set::Recorder;

/// How many chunks are read at a time if nobody waits for them; the rest of the room is for those that somebody waits for.
const UNASKED_MAX: usize = DEPTH as usize / 2;
/// The same while somebody waits: what is read besides is checked and copied in on the same thread.
const UNASKED_MEANWHILE_MAX: usize = 2;

/// How long only what is asked for is read at first: the machine is being built meanwhile, and its guest makes its first steps.
/// What is copied in beside that holds up both.
const REST: Duration = Duration::from_millis(20);

/// Memory on its way in.
pub(super) struct Loading {
    saved: Arc<Saved>,
    userfault: Userfault,
    places: Places,
    /// Of each chunk.
    stations: Vec<Station>,
    /// Chunks that somebody waits for, and that are not being read yet.
    wanted: VecDeque<usize>,
    /// How many are being read that somebody waits for.
    awaited: usize,
    /// Chunks that are to be read before the others, unless they were meanwhile.
    first: VecDeque<usize>,
    /// The next chunk that is read because it is its turn.
    turn: usize,
    /// Before then only what is asked for is read.
    rest_until: Instant,
    /// Chunks of which something was saved that is not there yet.
    missing: usize,
    errands: Vec<Errand>,
    recorder: Recorder,
    /// For the addresses of faults.
    faults: Vec<u64>,
}

/// Chunks that another thread wants to have there before it goes on.
struct Errand {
    /// Those that are not there yet.
    missing: Vec<usize>,
    /// Told when they are; dropped when one is lost.
    brought: Sender<()>,
}

/// How far a chunk is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Station {
    Absent,
    /// Somebody waits for it.
    Wanted,
    Reading,
    /// It is being read, and somebody waits for it.
    ReadingWanted,
    There,
    /// It will never be there.
    Lost,
    /// As `Lost`, and somebody waits for it.
    LostWanted,
}

/// Why the thread does not go on.
enum Stop {
    /// All memory is there.
    Complete,
    /// It was told to.
    Told,
    /// Nothing can be loaded any more.
    Broken(String),
}

impl Loading {
    /// Everything is absent; `first` are chunks to begin with, of this memory or not.
    pub(super) fn new(saved: Arc<Saved>, guarded: Guarded, first: Vec<usize>) -> Self {
        let missing = saved_chunks(&saved.table).count();
        let stations = vec![Station::Absent; saved.table.chunks()];
        Self {
            saved,
            userfault: guarded.userfault,
            places: guarded.places,
            stations,
            wanted: VecDeque::new(),
            awaited: 0,
            recorder: Recorder::new(first.clone()),
            first: first.into(),
            turn: 0,
            rest_until: Instant::now() + REST,
            missing,
            errands: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Loads until all is there or it is told to stop. Returns a working set, too, if it is still to be recorded: with a server,
    /// for which nobody who needs memory waits.
    pub(super) fn run(
        mut self,
        pipeline: PreparedPipeline,
        orders: &OrderInbox,
        progress: &Progress,
        ending: &Ending,
    ) -> (Remains, Option<Recorder>) {
        let stopped = match self.reader(pipeline, orders) {
            Ok(mut reader) => {
                let stopped = self.load(&mut reader, orders, progress, ending);
                let stopped = stopped.unwrap_or_else(|error| Stop::Broken(chain(error.as_ref())));
                finish_reading(reader);
                stopped
            }
            Err(error) => Stop::Broken(chain(&error)),
        };
        if let Stop::Broken(reason) = &stopped {
            let reason = reason.clone();
            ending.announce(End::MemoryLost { reason });
        }
        let all_is_there = matches!(stopped, Stop::Complete) && self.release().is_ok();
        let is_remote = open::is_remote(&self.saved.path);
        match (&stopped, is_remote) {
            (Stop::Complete, true) if all_is_there => return (Remains::Nothing, Some(self.recorder)),
            // Of a machine that ends, the process may as well: a file would be left half written.
            (Stop::Complete | Stop::Told, true) | (Stop::Broken(_), _) => {}
            (Stop::Complete | Stop::Told, false) => record_working_set(&self.saved, &self.recorder),
        }
        if all_is_there {
            return (Remains::Nothing, None);
        }
        let remains = self.remains();
        // What is absent is never to be taken for zeros.
        std::mem::forget(self.userfault);
        (remains, None)
    }

    fn reader(&self, pipeline: PreparedPipeline, orders: &OrderInbox) -> std::io::Result<ChunkReader> {
        let mut reader = ChunkReader::bind(pipeline, Arc::clone(&self.saved))?;
        reader.watch(self.userfault.as_raw_fd())?;
        reader.watch(orders.as_raw_fd())?;
        Ok(reader)
    }

    fn load(
        &mut self,
        reader: &mut ChunkReader,
        orders: &OrderInbox,
        progress: &Progress,
        ending: &Ending,
    ) -> Result<Stop, Box<dyn Error>> {
        while self.missing > 0 {
            // Faults are looked for in each round: those who wait come before what has been read meanwhile.
            self.take_faults()?;
            self.start_reads(reader);
            let rest = self.rest_until.checked_duration_since(Instant::now());
            match reader.next(rest)? {
                Read::Chunk(chunk) => {
                    self.put(&chunk)?;
                    progress.add(self.saved_pages(chunk.chunk).bytes());
                    reader.recycle(chunk);
                }
                Read::Lost(chunk, error) => {
                    let reason = chain(&error);
                    ending.announce(End::MemoryLost { reason });
                    self.lose(chunk);
                }
                Read::Signalled => {
                    for order in orders.take() {
                        match order {
                            Order::Bring { chunks, brought } => self.run_errand(chunks, brought),
                            Order::Stop => return Ok(Stop::Told),
                        }
                    }
                }
                Read::TimedOut => {}
            }
        }
        Ok(Stop::Complete)
    }

    /// Learns who waits for what, and serves what needs no reading.
    fn take_faults(&mut self) -> std::io::Result<()> {
        let mut faults = std::mem::take(&mut self.faults);
        self.userfault.faults(&mut faults)?;
        for address in faults.drain(..) {
            // No other memory is guarded.
            let Some(chunk) = self.places.chunk_at(address) else {
                continue;
            };
            match self.station(chunk) {
                Station::Absent if self.saved_pages(chunk) == Pages::NONE => {
                    self.zero_holes(chunk)?;
                    self.set_station(chunk, Station::There);
                }
                Station::Absent | Station::Reading => {
                    self.recorder.add(chunk);
                    self.want(chunk);
                }
                Station::Lost => self.set_station(chunk, Station::LostWanted),
                // It came while the fault was on its way here; or the guest has given the page back since (a balloon), and
                // then it is one of zeros.
                Station::There => self.userfault.zero(HostRange::page_at(address))?,
                Station::Wanted | Station::ReadingWanted | Station::LostWanted => {}
            }
        }
        self.faults = faults;
        Ok(())
    }

    /// Notes that somebody waits for `chunk`, of which something was saved.
    fn want(&mut self, chunk: usize) {
        match self.station(chunk) {
            Station::Absent => {
                self.wanted.push_back(chunk);
                self.set_station(chunk, Station::Wanted);
            }
            Station::Reading => {
                self.awaited += 1;
                self.set_station(chunk, Station::ReadingWanted);
            }
            _ => {}
        }
    }

    fn run_errand(&mut self, chunks: Vec<usize>, brought: Sender<()>) {
        let is_missing =
            |chunk: &usize| self.saved_pages(*chunk) != Pages::NONE && self.station(*chunk) != Station::There;
        let missing: Vec<usize> = chunks.into_iter().filter(is_missing).collect();
        let is_lost = |chunk: &usize| matches!(self.station(*chunk), Station::Lost | Station::LostWanted);
        if missing.iter().any(is_lost) {
            return;
        }
        missing.iter().for_each(|chunk| self.want(*chunk));
        self.errands.push(Errand { missing, brought });
        self.end_errands();
    }

    /// Tells those whose chunks are all there.
    fn end_errands(&mut self) {
        for errand in self.errands.extract_if(.., |errand| errand.missing.is_empty()) {
            // Whoever wanted it may have given up.
            let _ = errand.brought.send(());
        }
    }

    /// Fills the room of the reader, with what somebody waits for first.
    fn start_reads(&mut self, reader: &mut ChunkReader) {
        while reader.has_room() {
            if let Some(chunk) = self.wanted.pop_front() {
                self.awaited += 1;
                self.set_station(chunk, Station::ReadingWanted);
                reader.start(chunk);
                continue;
            }
            let unasked_max = if self.awaited > 0 {
                UNASKED_MEANWHILE_MAX
            } else {
                UNASKED_MAX
            };
            if reader.in_flight() - self.awaited >= unasked_max {
                break;
            }
            let Some(chunk) = self.next_unasked() else { break };
            self.set_station(chunk, Station::Reading);
            reader.start(chunk);
        }
    }

    /// The next chunk that nobody has asked for.
    fn next_unasked(&mut self) -> Option<usize> {
        let is_due = |loading: &Self, chunk| {
            loading.station(chunk) == Station::Absent && loading.saved_pages(chunk) != Pages::NONE
        };
        while let Some(chunk) = self.first.pop_front() {
            if is_due(self, chunk) {
                return Some(chunk);
            }
        }
        if Instant::now() < self.rest_until {
            return None;
        }
        while self.turn < self.stations.len() {
            let chunk = self.turn;
            self.turn += 1;
            if is_due(self, chunk) {
                return Some(chunk);
            }
        }
        None
    }

    /// Puts a chunk into its place, holes included: whoever waits for any page of it goes on.
    fn put(&mut self, chunk: &CheckedChunk) -> std::io::Result<()> {
        let start = self.places.address_of(chunk.chunk);
        for (offset, bytes) in chunk.runs() {
            self.userfault.fill(start + offset as u64, bytes)?;
        }
        self.zero_holes(chunk.chunk)?;
        self.leave_reading(chunk.chunk);
        self.set_station(chunk.chunk, Station::There);
        self.missing -= 1;
        for errand in &mut self.errands {
            errand.missing.retain(|missing| *missing != chunk.chunk);
        }
        self.end_errands();
        Ok(())
    }

    fn zero_holes(&self, chunk: usize) -> std::io::Result<()> {
        let start = self.places.address_of(chunk);
        let holes = self.saved_pages(chunk).others();
        holes.runs().try_for_each(|hole| {
            self.userfault.zero(HostRange {
                start: start + hole.start as u64,
                len_bytes: hole.len() as u64,
            })
        })
    }

    /// From now on only what somebody waits for is read, so that devices can come to an end.
    fn lose(&mut self, chunk: usize) {
        let lost = match self.station(chunk) {
            Station::ReadingWanted => Station::LostWanted,
            _ => Station::Lost,
        };
        self.leave_reading(chunk);
        self.set_station(chunk, lost);
        self.errands.retain(|errand| !errand.missing.contains(&chunk));
        self.first.clear();
        self.turn = self.stations.len();
    }

    fn leave_reading(&mut self, chunk: usize) {
        if self.station(chunk) == Station::ReadingWanted {
            self.awaited -= 1;
        }
    }

    /// Guards the memory no more: holes that nobody has touched are zeros by themselves.
    fn release(&self) -> std::io::Result<()> {
        self.places
            .ranges()
            .try_for_each(|range| self.userfault.release(range))
    }

    /// Whether anybody waits for memory.
    fn remains(&mut self) -> Remains {
        let is_waited_for = |station: &Station| {
            matches!(
                station,
                Station::Wanted | Station::ReadingWanted | Station::LostWanted
            )
        };
        let mut untold = Vec::new();
        let told = self.userfault.faults(&mut untold);
        if told.is_err() || !untold.is_empty() || self.stations.iter().any(is_waited_for) {
            return Remains::Waiters;
        }
        Remains::Nothing
    }

    fn saved_pages(&self, chunk: usize) -> Pages {
        Pages(self.saved.table.mask(chunk))
    }

    /// Of a chunk that is none of this memory: lost.
    fn station(&self, chunk: usize) -> Station {
        self.stations.get(chunk).copied().unwrap_or(Station::Lost)
    }

    fn set_station(&mut self, chunk: usize, station: Station) {
        if let Some(place) = self.stations.get_mut(chunk) {
            *place = station;
        }
    }
}

/// Without it nothing is lost but time.
pub(super) fn record_working_set(saved: &Saved, recorder: &Recorder) {
    let Saved { path, table, .. } = saved;
    if let Err(error) = recorder.write(path, table.id()) {
        let reason = chain(&error);
        log::debug!("the working set of memory file `{path}` is not recorded: {reason}");
    }
}

/// Waits for what is in flight, for a time; what is still in flight then keeps its buffers for good.
fn finish_reading(mut reader: ChunkReader) {
    let end = Instant::now() + Duration::from_millis(END_MS_MAX / 2);
    while reader.in_flight() > 0 {
        let left = end.saturating_duration_since(Instant::now());
        match reader.next(Some(left)) {
            Ok(Read::TimedOut) | Err(_) => {
                std::mem::forget(reader);
                return;
            }
            Ok(_) => {}
        }
    }
}
