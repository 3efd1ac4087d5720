//! A storage that answers when a test says so.
#![expect(unsafe_code, reason = "the storage fills the segments of its requests")]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::sync::Mutex;
use std::time::Instant;

use coracle_devices::bus::{Bus, BusDevice, BusRange};
use coracle_devices::power::EndSignal;
use coracle_storage::backend::{Access, Backend, Discard, Geometry, Step};
use coracle_storage::reactor::{Event, ImageFile, Submit};
use coracle_storage::request::{Completion, Request};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::kvm::vcpu::{Outside, Vcpu};
use crate::kvm::vm::{DirtyLog, Vm};
use crate::memory::testing::{Snapshot, resident, touch, waits};
use crate::memory::{Backing, MIB, PageSize, allocate};
use crate::snapshot::memory::{CHUNK_BYTES, PAGE_BYTES};

/// Which chunks are meant.
type Choice = fn(usize) -> bool;

/// What a test and its storage share.
#[derive(Default)]
struct Server {
    /// The chunks that were asked for, in order.
    asked: Mutex<Vec<usize>>,
    /// Those that may be answered; `None`: none.
    answers: Mutex<Option<Choice>>,
}

/// An image that keeps every request until it may be answered, and looks at that each millisecond.
struct Slow {
    server: Arc<Server>,
    bytes: Vec<u8>,
    waiting: Vec<Request>,
    next_look: Instant,
}

impl Backend for Slow {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.bytes.len() as u64,
            logical_block_bytes: 512,
            physical_block_bytes: 512,
            access: Access::ReadOnly,
            discard: Discard::Ignored,
        }
    }

    fn files(&self) -> Vec<ImageFile> {
        Vec::new()
    }

    fn start(&mut self, request: Request, _: &mut dyn Submit) -> Step {
        self.server.asked.lock().unwrap().push(chunk_of(&request));
        self.waiting.push(request);
        Step::Pending
    }

    fn resume(&mut self, _: Event, _: &mut dyn Submit) -> Step {
        Step::Pending
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        None
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn alarm(&self) -> Option<Instant> {
        Some(self.next_look)
    }

    fn wake(&mut self, _: &mut dyn Submit) {
        self.next_look = Instant::now() + Duration::from_millis(1);
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let may_be_answered = (*self.server.answers.lock().unwrap())?;
        let at = self
            .waiting
            .iter()
            .position(|request| may_be_answered(chunk_of(request)))?;
        let request = self.waiting.remove(at);
        let segment = request.segments[0];
        let from = usize::try_from(request.offset_bytes).unwrap();
        let bytes = &self.bytes[from..from + segment.len_bytes()];
        // SAFETY: the request has not completed, so its segment is there, and is as long as the bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), segment.address(), bytes.len()) };
        Some(Completion {
            request,
            outcome: Ok(()),
        })
    }
}

fn chunk_of(request: &Request) -> usize {
    usize::try_from(request.offset_bytes / CHUNK_BYTES as u64).unwrap()
}

/// A pager on a storage that does not answer yet.
struct Rig {
    snapshot: Snapshot,
    memory: Arc<GuestMemoryMmap>,
    server: Arc<Server>,
    ending: Ending,
    pager: Pager,
}

impl Rig {
    fn new(first: &[usize]) -> Self {
        let snapshot = Snapshot::new(8, 2);
        let server = Arc::<Server>::default();
        let image = Box::new(Slow {
            server: Arc::clone(&server),
            bytes: snapshot.bytes.clone(),
            waiting: Vec::new(),
            next_look: Instant::now(),
        });
        let memory = allocate(
            snapshot.bytes.len() as u64 / MIB,
            Backing::Anonymous,
            PageSize::Base,
        )
        .unwrap();
        let saved = Arc::new(Saved {
            path: snapshot.path.clone(),
            table: Arc::clone(&snapshot.table),
            layout: (snapshot.bytes.len() as u64 / MIB).into(),
        });
        let ending = Ending::new().unwrap();
        let pipeline = PreparedPipeline::new(image, crate::memory::reading::DEPTH);
        let guarded = Guarded::new(&memory).unwrap();
        let pager = Pager::start(guarded, saved, pipeline, first.to_vec(), ending.clone()).unwrap();
        Self {
            snapshot,
            memory,
            server,
            ending,
            pager,
        }
    }

    /// Waits until so many chunks were asked for, and returns them.
    fn asked(&self, count: usize) -> Vec<usize> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let asked = self.server.asked.lock().unwrap().clone();
            if asked.len() >= count {
                return asked;
            }
            assert!(Instant::now() < end, "{asked:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn answer(&self, which: Choice) {
        *self.server.answers.lock().unwrap() = Some(which);
    }

    /// The first byte of the last chunk that was saved.
    fn last(&self) -> (usize, usize) {
        let chunk = *self.snapshot.saved_chunks().last().unwrap();
        (chunk, self.snapshot.first_byte(chunk))
    }
}

#[test]
fn what_somebody_waits_for_is_read_at_once_and_before_the_rest() {
    let rig = Rig::new(&[]);
    let unasked = rig.asked(8);
    assert_eq!(
        unasked,
        rig.snapshot.saved_chunks()[..8],
        "the rest is read in order, a few at a time"
    );
    let (chunk, offset) = rig.last();
    let touched = touch(&rig.memory, offset);
    assert_eq!(rig.asked(9)[8..], [chunk]);
    // Nothing else is answered yet.
    rig.answer(|chunk| chunk > 64);
    let byte = touched.recv_timeout(Duration::from_secs(5));
    assert_eq!(byte, Ok(rig.snapshot.bytes[offset]));
    rig.answer(|_| true);
    assert_eq!(
        touch(&rig.memory, 0).recv_timeout(Duration::from_secs(5)),
        Ok(rig.snapshot.bytes[0])
    );
}

#[test]
fn a_hole_is_zeros_at_once_whatever_the_storage_does() {
    let rig = Rig::new(&[]);
    let table = &rig.snapshot.table;
    let hole = (0..table.chunks()).rfind(|chunk| table.mask(*chunk) == 0);
    let offset = hole.unwrap() * CHUNK_BYTES + 5000;
    assert_eq!(
        touch(&rig.memory, offset).recv_timeout(Duration::from_secs(5)),
        Ok(0)
    );
}

#[test]
fn a_page_that_the_guest_has_given_back_is_zeros_while_others_are_still_to_come() {
    let rig = Rig::new(&[]);
    let saved = rig.snapshot.saved_chunks();
    let (here, absent) = (
        rig.snapshot.first_byte(saved[0]),
        rig.snapshot.first_byte(saved[30]),
    );
    rig.answer(|chunk| chunk < 8);
    let read = |offset| touch(&rig.memory, offset).recv_timeout(Duration::from_secs(5));
    assert_eq!(read(here), Ok(rig.snapshot.bytes[here]));
    let page_of = |offset: usize| (offset / PAGE_BYTES * PAGE_BYTES) as u64;
    for offset in [here, absent] {
        crate::memory::discard(&rig.memory, GuestAddress(page_of(offset)), PAGE_BYTES).unwrap();
    }
    assert_eq!(read(here), Ok(0));
    // What is written there since stays, and what has not come yet comes as it was saved.
    rig.memory.write_obj(0x5e_u8, GuestAddress(here as u64)).unwrap();
    rig.answer(|_| true);
    assert_eq!(read(absent), Ok(rig.snapshot.bytes[absent]));
    assert_eq!(read(here), Ok(0x5e));
    assert_eq!(rig.ending.announced(), None);
}

#[test]
fn what_is_said_to_be_asked_for_soon_is_read_first() {
    let saved = Snapshot::new(8, 2).saved_chunks();
    let soon = [saved[40], saved[20], saved[21]];
    // One that is none of this memory is none of anybody's business.
    let rig = Rig::new(&[soon[0], usize::MAX, 128, soon[1], soon[1], soon[2]]);
    assert_eq!(rig.asked(8)[..3], soon);
    assert_eq!(rig.asked(8)[3..], saved[..5]);
    drop(rig.pager);
}

#[test]
fn a_server_that_is_gone_keeps_who_waits_and_no_pager() {
    let rig = Rig::new(&[]);
    let (_, offset) = rig.last();
    let touched = touch(&rig.memory, offset);
    assert!(waits(&touched), "memory was seen before it came");
    let begun = Instant::now();
    assert_eq!(rig.pager.end(), Remains::Waiters);
    assert!(begun.elapsed() < Duration::from_millis(END_MS_MAX));
    assert!(waits(&touched), "zeros were seen at the end");
    assert_eq!(rig.ending.announced(), None);
}

#[test]
fn memory_that_never_came_is_no_zeros_after_the_pager() {
    let rig = Rig::new(&[]);
    let (_, offset) = rig.last();
    assert_eq!(rig.pager.end(), Remains::Nothing);
    assert!(waits(&touch(&rig.memory, offset)), "zeros were seen");
}

#[test]
fn a_pager_that_has_ended_by_itself_leaves_memory_like_any_other() {
    let rig = Rig::new(&[]);
    rig.answer(|_| true);
    let progress = Arc::clone(rig.pager.progress());
    let end = Instant::now() + Duration::from_secs(10);
    while progress.loaded_bytes() < progress.total_bytes() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (_, offset) = rig.last();
    let before = touch(&rig.memory, offset).recv_timeout(Duration::from_secs(5));
    assert_eq!(before, Ok(rig.snapshot.bytes[offset]));
    assert_eq!(rig.pager.end(), Remains::Nothing);
    assert_eq!(rig.ending.announced(), None);
}

#[test]
fn a_thread_can_have_memory_brought_in_before_it_touches_it() {
    let rig = Rig::new(&[]);
    let (chunk, offset) = rig.last();
    let range = [(GuestAddress(offset as u64), 1)];
    let late = rig.pager.bring(&range, Duration::from_millis(20)).unwrap_err();
    assert!(matches!(late, BringError::Late { .. }), "{late:?}");
    assert_eq!(
        rig.asked(1)[0],
        chunk,
        "it is asked for at once, and before all others"
    );
    rig.answer(|chunk| chunk > 64);
    rig.pager.bring(&range, Duration::from_secs(5)).unwrap();
    let address = rig.memory.get_host_address(range[0].0).unwrap() as u64;
    assert_eq!(resident(address, 1), 1);
    // Holes, what is no memory, and nothing at all are there at once.
    let others = [
        (GuestAddress(1 << 40), 8),
        (GuestAddress(0), u64::MAX),
        (GuestAddress(0), 0),
    ];
    rig.pager.bring(&others, Duration::from_secs(5)).unwrap();
    rig.answer(|_| true);
    let all = [(GuestAddress(0), rig.snapshot.bytes.len() as u64)];
    for _ in 0..3 {
        rig.pager.bring(&all, Duration::from_secs(5)).unwrap();
    }
    assert_eq!(
        rig.pager.progress().loaded_bytes(),
        rig.pager.progress().total_bytes()
    );
}

/// A vCPU of `vm` that reads the first byte which was saved in its first MiB, and writes it to port 0x80.
fn vcpu(rig: &Rig, vm: &Vm) -> (VcpuFd, u8) {
    let table = &rig.snapshot.table;
    let hole = (0..16).find(|chunk| table.mask(*chunk) == 0).unwrap();
    let code = GuestAddress((hole * CHUNK_BYTES) as u64);
    // mov al, [0]; out 0x80, al; hlt
    let program = [0xa0, 0x00, 0x00, 0xe6, 0x80, 0xf4];
    rig.memory.write_slice(&program, code).unwrap();
    let saved = rig.snapshot.saved_chunks();
    let data = rig
        .snapshot
        .first_byte(*saved.iter().rfind(|chunk| **chunk < 16).unwrap());
    let fd = vm.create_vcpu(0).unwrap();
    let mut segments = fd.get_sregs().unwrap();
    for (segment, base) in [(&mut segments.cs, code.0), (&mut segments.ds, data as u64)] {
        segment.base = base;
        segment.selector = u16::try_from(base >> 4).unwrap();
    }
    fd.set_sregs(&segments).unwrap();
    let mut registers = fd.get_regs().unwrap();
    (registers.rip, registers.rflags) = (0, 2);
    fd.set_regs(&registers).unwrap();
    (fd, rig.snapshot.bytes[data])
}

fn vm(rig: &Rig) -> Vm {
    let kvm = crate::kvm::vm::open().unwrap();
    Vm::new(&kvm, Arc::clone(&rig.memory), None, DirtyLog::Off).unwrap()
}

#[test]
fn a_vcpu_waits_in_kvm_run_for_its_memory_and_sees_what_was_saved() {
    let rig = Rig::new(&[]);
    let vm = vm(&rig);
    let (mut fd, expected) = vcpu(&rig, &vm);
    let (outbox, inbox) = channel();
    std::thread::spawn(move || {
        let exit = match fd.run() {
            Ok(VcpuExit::IoOut(0x80, data)) => data[0],
            other => panic!("{other:?}"),
        };
        outbox.send(exit).unwrap();
    });
    assert!(waits(&inbox), "the guest went on without its memory");
    rig.answer(|_| true);
    assert_eq!(inbox.recv_timeout(Duration::from_secs(10)), Ok(expected));
}

/// Everything that a guest has written to a port.
#[derive(Default)]
struct Port(Vec<u8>);

impl BusDevice for Port {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, data: &[u8]) {
        self.0.extend(data);
    }
}

#[test]
fn a_machine_whose_vcpu_waits_for_memory_that_never_comes_can_be_ended_and_never_goes_on() {
    crate::kvm::vcpu::install_kick_handler().unwrap();
    let rig = Rig::new(&[]);
    let vm = vm(&rig);
    let (fd, _) = vcpu(&rig, &vm);
    let port = Arc::<Mutex<Port>>::default();
    let mut ports = Bus::new();
    let range = BusRange { start: 0x80, len: 1 };
    ports.insert(range, "port", port.clone()).unwrap();
    let outside = Outside {
        ports: Arc::new(ports),
        mmio: Arc::new(Bus::new()),
        memory: Arc::clone(&rig.memory),
        files: Vec::new(),
        ending: rig.ending.clone(),
        guest_end: EndSignal::new().unwrap(),
        counters: Arc::default(),
        share: Arc::default(),
    };
    let vcpu = Vcpu::spawn(0, fd, outside).unwrap();
    vcpu.run().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    // It follows where the kernel lets a signal end the wait for memory, and is left behind where not.
    drop(vcpu);
    assert!(
        port.lock().unwrap().0.is_empty(),
        "the guest went on without its memory"
    );
    // Even then it does not go on when its memory comes after all.
    rig.answer(|_| true);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(rig.pager.end(), Remains::Nothing);
    assert!(port.lock().unwrap().0.is_empty(), "the guest went on");
    assert_eq!(rig.ending.announced(), None);
}
