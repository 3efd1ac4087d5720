//! What is tried: each is a few system calls, and stops at the first that is refused.

#![expect(
    unsafe_code,
    reason = "it asks the kernel for what no wrapper among our crates asks for"
)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::ptr;
use std::time::Duration;

use rustix::event::{Timespec, poll};

use crate::World;

/// One way out.
pub(super) type Attempt = fn(&World) -> io::Result<()>;

/// How many files, processes or pieces of memory are asked for: more than a test allows.
const MANY: usize = 256;
const MEBIBYTE: usize = 1 << 20;
/// How much time an attempt lets pass that is interrupted.
const PASSED: Duration = Duration::from_millis(100);

/// By the names that the test has for them, too.
const ATTEMPTS: &[(&str, Attempt)] = &[
    ("open", |world| open(&world.secret)),
    ("open-by-dots", |world| {
        open(&format!("/../../../../..{}", world.secret))
    }),
    ("open-by-link", |world| open(&format!("{}/link", world.directory))),
    ("open-by-link-of-dots", |world| {
        open(&format!("{}/dots", world.directory))
    }),
    ("open-by-proc", |world| {
        open(&format!("/proc/{}/root{}", world.pid, world.secret))
    }),
    ("open-by-own-root", |world| {
        open(&format!("/proc/self/root/..{}", world.secret))
    }),
    ("write", |world| {
        open_at(&world.secret, libc::O_RDWR | libc::O_CLOEXEC).map(drop)
    }),
    ("list", |world| {
        open_at(
            &world.directory,
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
        .map(drop)
    }),
    ("make", |world| {
        let made = format!("{}/made", world.directory);
        open_at(&made, libc::O_WRONLY | libc::O_CREAT | libc::O_CLOEXEC)?;
        std::fs::remove_file(made)
    }),
    ("log", |_| {
        log::warn!("a line");
        Ok(())
    }),
    // What the heap ends with, to which the C library asks for more in the same way.
    ("grow", |_| call(libc::SYS_brk, [0; 5]).map(drop)),
    ("yield", |_| call(libc::SYS_sched_yield, [0; 5]).map(drop)),
    ("let-go", |_| call(libc::SYS_close, [0; 5]).map(drop)),
    // The two ways to let time pass, of which a stop of the process has the first go on by `restart_syscall`.
    ("wait", |_| {
        std::thread::park_timeout(PASSED);
        Ok(())
    }),
    ("rest", |_| {
        let passed = Timespec::try_from(PASSED).map_err(io::Error::other)?;
        poll(&mut [], Some(&passed)).map(drop).map_err(io::Error::from)
    }),
    ("panic", |_| panic!("as asked")),
    ("open-by-handle", open_by_handle),
    ("change-root", |world| at_path(libc::SYS_chroot, &world.directory)),
    ("swap-root", |_| swap_root()),
    ("make-a-disk-node", make_a_disk_node),
    ("mount", mount),
    ("unmount", unmount),
    ("copy-a-mount", |_| copy_a_mount()),
    ("make-a-file-system", |_| at_path(libc::SYS_fsopen, "tmpfs")),
    ("user-namespace", |_| {
        call(libc::SYS_unshare, [whole(libc::CLONE_NEWUSER), 0, 0, 0, 0]).map(drop)
    }),
    ("mount-namespace", |_| {
        call(libc::SYS_unshare, [whole(libc::CLONE_NEWNS), 0, 0, 0, 0]).map(drop)
    }),
    ("enter-namespaces", enter_namespaces),
    ("process-in-a-user-namespace", |_| clone(libc::CLONE_NEWUSER)),
    ("trace", |world| {
        call(libc::SYS_ptrace, [PTRACE_SEIZE, whole(world.pid), 0, 0, 0]).map(drop)
    }),
    ("read-memory", read_memory),
    ("take-a-descriptor", take_a_descriptor),
    ("signal", |world| {
        call(libc::SYS_kill, [whole(world.pid), whole(libc::SIGWINCH), 0, 0, 0]).map(drop)
    }),
    ("probe-a-process", |world| {
        call(libc::SYS_kill, [whole(world.pid), 0, 0, 0, 0]).map(drop)
    }),
    ("limit-a-process", |world| {
        call(libc::SYS_prlimit64, [whole(world.pid), NOFILE, 0, 0, 0]).map(drop)
    }),
    ("raw-socket", |_| {
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP).map(drop)
    }),
    ("packet-socket", |_| {
        socket(libc::AF_PACKET, libc::SOCK_RAW, 0).map(drop)
    }),
    ("service-of-the-host", service_of_the_host),
    ("socket-of-the-host", socket_of_the_host),
    ("kexec", |_| call(libc::SYS_kexec_load, [0; 5]).map(drop)),
    ("load-a-module", |_| {
        call(libc::SYS_finit_module, [usize::MAX, 0, 0, 0, 0]).map(drop)
    }),
    // With numbers that no kernel takes for orders.
    ("reboot", |_| call(libc::SYS_reboot, [0; 5]).map(drop)),
    ("stop-swapping", |_| at_path(libc::SYS_swapoff, "/")),
    ("name-the-host", |_| {
        call(libc::SYS_sethostname, [0, usize::MAX, 0, 0, 0]).map(drop)
    }),
    ("reach-ports", |_| {
        call(libc::SYS_ioperm, [0x80, 1, 1, 0, 0]).map(drop)
    }),
    ("add-a-key", |_| add_a_key()),
    ("own-ring", |_| own_ring()),
    ("become-root", |_| call(libc::SYS_setresuid, [0; 5]).map(drop)),
    ("join-a-group", |_| {
        call(
            libc::SYS_setgroups,
            [1, ptr::from_ref(&0_u32).expose_provenance(), 0, 0, 0],
        )
        .map(drop)
    }),
    ("take-capabilities", |_| take_capabilities()),
    ("raise-a-limit", |_| raise_a_limit()),
    ("run-a-program", |_| run_a_program()),
    ("run-what-was-written", |_| run_what_was_written()),
    ("fork", |_| clone(0)),
    ("fork-by-clone3", |_| fork_by_clone3()),
    ("fork-bomb", |_| fork_bomb()),
    ("thread-bomb", |_| thread_bomb()),
    ("many-files", |_| many_files()),
    ("much-memory", |_| much_memory()),
    ("long-file", long_file),
];

/// The attempt of that name.
pub(super) fn named(name: &str) -> Option<Attempt> {
    ATTEMPTS
        .iter()
        .find_map(|(own, attempt)| (*own == name).then_some(*attempt))
}

/// What rustix and libc do not name.
const PTRACE_SEIZE: usize = 0x4206;
const NOFILE: usize = 7;
/// What a test allows in a jail.
const FILES: u64 = 64;
const IORING_SETUP_BYTES: usize = 120;
const CLONE_ARGS_BYTES: usize = 88;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const KEY_SPEC_PROCESS_KEYRING: i32 = -2;

/// A system call by its number.
fn call(number: libc::c_long, arguments: [usize; 5]) -> io::Result<usize> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: what arguments point to is alive and of the size that the call reads or writes: see whoever calls this.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e, 0_usize) };
    usize::try_from(answer).map_err(|_| io::Error::last_os_error())
}

/// An argument that may be negative.
fn whole(value: i32) -> usize {
    isize::try_from(value).unwrap_or_default().cast_unsigned()
}

fn path(path: &str) -> io::Result<CString> {
    CString::new(path).map_err(io::Error::other)
}

/// A call whose first argument is a path, and which is content with zeros for the rest.
fn at_path(number: libc::c_long, name: &str) -> io::Result<()> {
    call(number, [path(name)?.as_ptr().expose_provenance(), 0, 0, 0, 0]).map(drop)
}

fn open_at(name: &str, flags: i32) -> io::Result<usize> {
    let name = path(name)?;
    call(
        libc::SYS_openat,
        [
            whole(libc::AT_FDCWD),
            name.as_ptr().expose_provenance(),
            whole(flags),
            0,
            0,
        ],
    )
}

fn open(name: &str) -> io::Result<()> {
    open_at(name, libc::O_RDONLY | libc::O_CLOEXEC).map(drop)
}

/// The root of a file system by its number, as file servers open it.
fn open_by_handle(_: &World) -> io::Result<()> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        inode: [u32; 2],
    }
    let handle = Handle {
        bytes: 8,
        kind: 1,
        inode: [2, 0],
    };
    let handle = ptr::from_ref(&handle).expose_provenance();
    call(
        libc::SYS_open_by_handle_at,
        [whole(libc::AT_FDCWD), handle, 0, 0, 0],
    )
    .map(drop)
}

fn swap_root() -> io::Result<()> {
    let here = path(".")?;
    let here = here.as_ptr().expose_provenance();
    call(libc::SYS_pivot_root, [here, here, 0, 0, 0]).map(drop)
}

/// A node of the first loop device, which is opened.
fn make_a_disk_node(world: &World) -> io::Result<()> {
    let name = path(&format!("{}/node", world.directory))?;
    let mode = usize::try_from(libc::S_IFBLK | 0o600).unwrap_or_default();
    let device = usize::try_from(libc::makedev(7, 0)).unwrap_or_default();
    call(
        libc::SYS_mknodat,
        [
            whole(libc::AT_FDCWD),
            name.as_ptr().expose_provenance(),
            mode,
            device,
            0,
        ],
    )?;
    std::fs::remove_file(format!("{}/node", world.directory))
}

fn mount(world: &World) -> io::Result<()> {
    let (kind, at) = (path("tmpfs")?, path(&world.directory)?);
    call(
        libc::SYS_mount,
        [
            kind.as_ptr().expose_provenance(),
            at.as_ptr().expose_provenance(),
            kind.as_ptr().expose_provenance(),
            0,
            0,
        ],
    )?;
    call(libc::SYS_umount2, [at.as_ptr().expose_provenance(), 0, 0, 0, 0]).map(drop)
}

/// Of what is no mount: whoever may not unmount is told so first.
fn unmount(world: &World) -> io::Result<()> {
    at_path(libc::SYS_umount2, &format!("{}/.", world.directory))
}

fn copy_a_mount() -> io::Result<()> {
    const OPEN_TREE_CLONE: usize = 1;
    let root = path("/")?;
    call(
        libc::SYS_open_tree,
        [
            whole(libc::AT_FDCWD),
            root.as_ptr().expose_provenance(),
            OPEN_TREE_CLONE,
            0,
            0,
        ],
    )
    .map(drop)
}

fn enter_namespaces(world: &World) -> io::Result<()> {
    let process = call(libc::SYS_pidfd_open, [whole(world.pid), 0, 0, 0, 0])?;
    call(libc::SYS_setns, [process, whole(libc::CLONE_NEWUTS), 0, 0, 0]).map(drop)
}

fn read_memory(world: &World) -> io::Result<()> {
    let mut byte = 0_u8;
    let own = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let far = libc::iovec {
        iov_base: ptr::without_provenance_mut(0x1000),
        iov_len: 1,
    };
    let (own, far) = (
        ptr::from_ref(&own).expose_provenance(),
        ptr::from_ref(&far).expose_provenance(),
    );
    call(libc::SYS_process_vm_readv, [whole(world.pid), own, 1, far, 1]).map(drop)
}

fn take_a_descriptor(world: &World) -> io::Result<()> {
    let process = call(libc::SYS_pidfd_open, [whole(world.pid), 0, 0, 0, 0])?;
    call(libc::SYS_pidfd_getfd, [process, 0, 0, 0, 0]).map(drop)
}

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<usize> {
    call(
        libc::SYS_socket,
        [
            whole(family),
            whole(kind | libc::SOCK_CLOEXEC),
            whole(protocol),
            0,
            0,
        ],
    )
}

fn service_of_the_host(world: &World) -> io::Result<()> {
    let descriptor = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let address = libc::sockaddr_in {
        sin_family: u16::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: world.port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
        },
        sin_zero: [0; 8],
    };
    connect(
        descriptor,
        ptr::from_ref(&address).expose_provenance(),
        size_of_val(&address),
    )
}

fn socket_of_the_host(world: &World) -> io::Result<()> {
    let descriptor = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    // The family, a NUL, and the name without one at its end.
    let mut address = u16::try_from(libc::AF_UNIX)
        .unwrap_or_default()
        .to_ne_bytes()
        .to_vec();
    address.push(0);
    address.extend(world.socket.as_bytes());
    connect(descriptor, address.as_ptr().expose_provenance(), address.len())
}

fn connect(descriptor: usize, address: usize, bytes: usize) -> io::Result<()> {
    call(libc::SYS_connect, [descriptor, address, bytes, 0, 0]).map(drop)
}

fn add_a_key() -> io::Result<()> {
    let (kind, name) = (path("user")?, path("coracle-test")?);
    let name = name.as_ptr().expose_provenance();
    let ring = whole(KEY_SPEC_PROCESS_KEYRING);
    call(
        libc::SYS_add_key,
        [kind.as_ptr().expose_provenance(), name, name, 1, ring],
    )
    .map(drop)
}

/// One that no other thread has restricted.
fn own_ring() -> io::Result<()> {
    let mut parameters = [0_u8; IORING_SETUP_BYTES];
    call(
        libc::SYS_io_uring_setup,
        [1, parameters.as_mut_ptr().expose_provenance(), 0, 0, 0],
    )
    .map(drop)
}

fn take_capabilities() -> io::Result<()> {
    let header = [CAPABILITY_VERSION_3, 0];
    // The lower 32 of those that are effective, permitted and inheritable, and then the upper ones.
    let administration = 1 << 21;
    let all = [administration, administration, 0, 0, 0, 0_u32];
    call(
        libc::SYS_capset,
        [
            header.as_ptr().expose_provenance(),
            all.as_ptr().expose_provenance(),
            0,
            0,
            0,
        ],
    )
    .map(drop)
}

/// For a test that allows so many files in the jail, and elsewhere more than twice as many.
fn raise_a_limit() -> io::Result<()> {
    let more = [2 * FILES, 2 * FILES];
    call(
        libc::SYS_prlimit64,
        [0, NOFILE, more.as_ptr().expose_provenance(), 0, 0],
    )
    .map(drop)
}

/// This one, which has nothing to do then.
fn run_a_program() -> io::Result<()> {
    let program = path(&std::env::args().next().unwrap_or_default())?;
    let task = path(r#"{ "attempts": [], "places": [] }"#)?;
    let words = [program.as_ptr(), task.as_ptr(), ptr::null()];
    call(
        libc::SYS_execve,
        [
            program.as_ptr().expose_provenance(),
            words.as_ptr().expose_provenance(),
            0,
            0,
            0,
        ],
    )
    .map(drop)
}

fn run_what_was_written() -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // Its sixth argument does not matter then.
    call(
        libc::SYS_mmap,
        [0, 4096, whole(protection), whole(flags), usize::MAX],
    )
    .map(drop)
}

/// A child, which ends at once. Whoever has made this process waits for both.
fn clone(flags: i32) -> io::Result<()> {
    let child = call(libc::SYS_clone, [whole(flags | libc::SIGCHLD), 0, 0, 0, 0])?;
    ends_if_it_is_one(child);
    Ok(())
}

fn fork_by_clone3() -> io::Result<()> {
    let mut arguments = [0_u64; CLONE_ARGS_BYTES / 8];
    // exit_signal is the fifth word.
    if let Some(signal) = arguments.get_mut(4) {
        *signal = u64::try_from(libc::SIGCHLD).unwrap_or_default();
    }
    let child = call(
        libc::SYS_clone3,
        [arguments.as_ptr().expose_provenance(), CLONE_ARGS_BYTES, 0, 0, 0],
    )?;
    ends_if_it_is_one(child);
    Ok(())
}

fn ends_if_it_is_one(child: usize) {
    if child == 0 {
        // SAFETY: this is a copy of a process, and nothing of it is of use.
        unsafe { libc::_exit(0) };
    }
}

/// Children that wait, until there are many or no more.
fn fork_bomb() -> io::Result<()> {
    let mut children = Vec::with_capacity(MANY);
    let outcome = (0..MANY).try_for_each(|_| {
        let child = call(libc::SYS_clone, [whole(libc::SIGCHLD), 0, 0, 0, 0])?;
        if child == 0 {
            loop {
                std::thread::sleep(std::time::Duration::from_secs(3600));
            }
        }
        children.push(child);
        Ok(())
    });
    for child in children {
        call(libc::SYS_kill, [child, whole(libc::SIGKILL), 0, 0, 0])?;
    }
    outcome
}

/// Threads that wait, until there are many or no more.
fn thread_bomb() -> io::Result<()> {
    let (keep, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
    let outcome = (0..MANY).try_for_each(|_| {
        let wait = std::sync::Arc::clone(&wait);
        let waits = move || drop(wait.lock().map(|wait| wait.recv()));
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(waits)
            .map(drop)
    });
    drop(keep);
    outcome
}

fn many_files() -> io::Result<()> {
    (0..MANY).try_for_each(|_| open_at("/dev/urandom", libc::O_RDONLY | libc::O_CLOEXEC).map(drop))
}

fn much_memory() -> io::Result<()> {
    let mut taken = Vec::with_capacity(MANY);
    // Not zeros, or no page would be made.
    taken.extend((0..MANY).map(|_| vec![1_u8; MEBIBYTE]));
    std::hint::black_box(&taken);
    Ok(())
}

fn long_file(world: &World) -> io::Result<()> {
    let mut file = File::create(format!("{}/long", world.directory))?;
    let piece = vec![1_u8; MEBIBYTE];
    (0..MANY / 16).try_for_each(|_| file.write_all(&piece))
}
