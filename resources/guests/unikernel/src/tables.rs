//! What the CPU reads by itself: task states with their stacks, descriptors of segments and of interrupts.

#![expect(
    unsafe_code,
    reason = "the CPU reads these through addresses in its registers"
)]

use core::cell::UnsafeCell;
use core::mem::offset_of;

use instrument::width::{low8, low16, low32};

/// vCPUs that can be started.
pub const CPUS_MAX: usize = 32;
/// Where a vCPU's stack ends in its [`CpuArea`].
const STACK_TOP_BYTES: usize = offset_of!(CpuArea, stack) + STACK_BYTES;
/// The first vector of the interrupt lines: line n, and IOAPIC input n, is vector 0x40 + n.
pub const LINE_VECTOR: u8 = 0x40;
/// Lines: the 24 inputs of an IOAPIC and one for vCPUs to wake each other.
pub const LINES: usize = 25;
/// The vector of interrupts that went away before they were delivered.
pub const SPURIOUS_VECTOR: u8 = 0xff;

const STACK_BYTES: usize = 32 << 10;
const PANIC_STACK_BYTES: usize = 16 << 10;
const INTERRUPT_STACK_BYTES: usize = 1024;
const EXCEPTIONS: usize = 32;
const CODE_NATIVE: u16 = 0x33;
const CODE_KERNEL: u16 = 0x08;
/// The selector of the first task state; the next is two entries on.
const TASK_SELECTOR: u16 = 0x40;
const BREAKPOINT: usize = 3;
const PAGE_FAULT: usize = 14;

/// A 64-bit task state with an I/O permission bitmap that permits every port.
#[repr(C, packed(4))]
struct TaskState {
    head: TaskHead,
    bitmap: [u8; 8192],
    /// The CPU reads the bitmap by pairs of bytes: one beyond its end must be there.
    bitmap_end: [u8; 2],
}

/// The part of it that has names.
#[repr(C, packed(4))]
struct TaskHead {
    reserved0: u32,
    stacks: [u64; 3],
    reserved1: u64,
    interrupt_stacks: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    bitmap_offset: u16,
}

/// What one vCPU has to itself. The task state comes first: the linker script takes its address from here.
#[repr(C, align(4096))]
pub struct CpuArea {
    task: TaskState,
    /// Interrupts, idling and page faults, at CPL 0.
    interrupt_stack: Stack<INTERRUPT_STACK_BYTES>,
    /// All other exceptions, at CPL 3.
    panic_stack: Stack<PANIC_STACK_BYTES>,
    /// Its work, at CPL 3. The first vCPU has a larger one elsewhere.
    stack: Stack<STACK_BYTES>,
}

#[repr(C, align(16))]
struct Stack<const BYTES: usize>([u8; BYTES]);

/// Memory that the CPU reads and writes behind the compiler's back.
#[repr(transparent)]
pub struct Hardware<T>(UnsafeCell<T>);

// SAFETY: every access goes through raw pointers; who writes what when is said where it is written.
unsafe impl<T> Sync for Hardware<T> {}

impl<T> Hardware<T> {
    /// Where it lies.
    pub const fn address(&self) -> *mut T {
        self.0.get()
    }
}

/// The areas of all vCPUs. Zero until a vCPU is prepared, so that none takes memory before it runs.
#[unsafe(export_name = "cpus")]
// SAFETY: all fields are integers, for which zero is a value.
static CPUS: Hardware<[CpuArea; CPUS_MAX]> = Hardware(UnsafeCell::new(unsafe { core::mem::zeroed() }));

/// An interrupt descriptor.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gate {
    offset_low: u16,
    selector: u16,
    stack: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

const ABSENT: Gate = Gate {
    offset_low: 0,
    selector: 0,
    stack: 0,
    kind: 0,
    offset_middle: 0,
    offset_high: 0,
    reserved: 0,
};

#[unsafe(export_name = "idt")]
static IDT: Hardware<[Gate; 256]> = Hardware(UnsafeCell::new([ABSENT; 256]));

unsafe extern "C" {
    static mut gdt: [u64; 8 + 2 * CPUS_MAX];
    static exception_stubs: [[u8; 16]; EXCEPTIONS];
    static interrupt_stubs: [[u8; 32]; LINES];
    static page_fault_entry: u8;
    static service_idle: u8;
    static service_unemulated: u8;
    static spurious_stub: u8;
}

/// Gives vCPU `index` its stacks and every I/O port. Before it starts, or by itself before its first port.
pub fn prepare_cpu(index: usize) {
    let area = CPUS.address().cast::<CpuArea>().wrapping_add(index);
    let top = |offset: usize, bytes: usize| area.addr() as u64 + (offset + bytes) as u64;
    let head = TaskHead {
        reserved0: 0,
        stacks: [
            top(offset_of!(CpuArea, interrupt_stack), INTERRUPT_STACK_BYTES),
            0,
            0,
        ],
        reserved1: 0,
        interrupt_stacks: [
            top(offset_of!(CpuArea, panic_stack), PANIC_STACK_BYTES),
            0,
            0,
            0,
            0,
            0,
            0,
        ],
        reserved2: 0,
        reserved3: 0,
        bitmap_offset: low16(offset_of!(TaskState, bitmap) as u64),
    };
    // SAFETY: `index` is below CPUS_MAX in every caller; only this vCPU, or its starter, uses the area now.
    unsafe { area.cast::<TaskHead>().write(head) };
    let end = area
        .wrapping_byte_add(offset_of!(TaskState, bitmap_end))
        .cast::<[u8; 2]>();
    // SAFETY: as above. The bitmap itself stays zero: every port is permitted.
    unsafe { end.write([0xff; 2]) };
}

/// Describes the task state of vCPU `index`; returns its selector and the top of its stack.
pub fn describe_cpu(index: usize) -> (u16, u64) {
    let area = CPUS.address().cast::<CpuArea>().wrapping_add(index);
    let base = area.addr() as u64;
    let limit = size_of::<TaskState>() as u64 - 1;
    let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    let first = (&raw mut gdt)
        .cast::<u64>()
        .wrapping_add(usize::from(TASK_SELECTOR) / 8 + 2 * index);
    // SAFETY: `index` is below CPUS_MAX, so both quadwords lie in the table; the vCPU is not running.
    unsafe { first.write_volatile(low) };
    // SAFETY: as above, the second quadword: the high half of the address, which is 0 here.
    unsafe { first.wrapping_add(1).write_volatile(base >> 32) };
    (
        TASK_SELECTOR + 16 * low16(index as u64),
        base + STACK_TOP_BYTES as u64,
    )
}

/// Fills the interrupt descriptors: from here on an exception is reported, int3 idles, and interrupts count.
pub fn fill_interrupt_descriptors() {
    for vector in 0..EXCEPTIONS {
        let stub = (&raw const exception_stubs)
            .cast::<u8>()
            .wrapping_add(16 * vector);
        set(
            vector,
            Gate {
                stack: 1,
                ..gate(stub, CODE_NATIVE, 0x8f)
            },
        );
    }
    set(PAGE_FAULT, gate(&raw const page_fault_entry, CODE_KERNEL, 0x8e));
    set(BREAKPOINT, gate(&raw const service_idle, CODE_KERNEL, 0xee));
    for line in 0..LINES {
        let stub = (&raw const interrupt_stubs).cast::<u8>().wrapping_add(32 * line);
        set(usize::from(LINE_VECTOR) + line, gate(stub, CODE_KERNEL, 0x8e));
    }
    set(
        usize::from(SPURIOUS_VECTOR),
        gate(&raw const spurious_stub, CODE_KERNEL, 0x8e),
    );
}

/// Takes every descriptor away: the next exception is a triple fault.
pub fn empty_interrupt_descriptors() {
    for vector in 0..256 {
        set(vector, ABSENT);
    }
}

/// Makes int3 execute POPCNT at CPL 0, which emulating hosts cannot.
pub fn make_breakpoint_unemulated() {
    set(BREAKPOINT, gate(&raw const service_unemulated, CODE_KERNEL, 0xee));
}

fn gate(entry: *const u8, selector: u16, kind: u8) -> Gate {
    let offset = entry.addr() as u64;
    Gate {
        offset_low: low16(offset),
        selector,
        stack: 0,
        kind,
        offset_middle: low16(offset >> 16),
        offset_high: low32(offset >> 32),
        reserved: 0,
    }
}

fn set(vector: usize, gate: Gate) {
    let slot = IDT
        .address()
        .cast::<Gate>()
        .wrapping_add(usize::from(low8(vector as u64)));
    // SAFETY: 256 entries, and the index has eight bits; the CPU reads one only when its vector is raised.
    unsafe { slot.write_volatile(gate) };
}
