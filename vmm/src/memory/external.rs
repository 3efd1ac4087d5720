//! Memory that another process brings in: Firecracker's protocol for the memory backend `Uffd`.
//!
//! The process listens on a Unix socket. It is sent one message: a JSON array of the mappings of the guest's memory, with the
//! userfaultfd that guards them. What it fills absent pages with is its own affair, and nothing of that is checked here.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with,
};
use serde::Serialize;
use vm_memory::GuestMemoryMmap;

use super::userfault::{HostRange, Userfault, UserfaultError};
use super::{Backing, Layout, MemoryError, PageSize, allocate, slots};
use crate::snapshot::memory::PAGE_BYTES;

/// How long the other process may take to accept a connection and a message.
const ACCEPT_MS_MAX: u64 = 5_000;

/// The guard of memory that another process fills. It stays for as long as this process lives, whether this is dropped or not:
/// should the other end, then whoever touches an absent page waits, and never reads zeros.
#[derive(Debug)]
pub struct External {
    _userfault: &'static Userfault,
}

/// Why another process cannot fill a guest's memory.
#[derive(Debug, thiserror::Error)]
pub enum ExternalError {
    /// No such memory can be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host does not tell of absent pages.
    #[error(
        "another process cannot fill guest memory; set vm.unprivileged_userfaultfd to 1, or give the monitor access to \
         /dev/userfaultfd"
    )]
    Userfault(#[from] UserfaultError),
    /// Pages of hugetlbfs.
    #[error(
        "memory of huge pages is not filled by another process: set `huge_pages` to `None`, or load the memory from its file"
    )]
    HugePages,
    /// Nobody listens.
    #[error("cannot hand guest memory to the process that listens on `{socket}`")]
    Socket {
        /// The socket.
        socket: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// One mapping of guest memory, as Firecracker tells of it.
#[derive(Debug, Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    /// Where its first byte lies in a memory file.
    offset: u64,
    page_size: usize,
    /// Bytes, too: the name is an old mistake of the protocol.
    page_size_kib: usize,
}

/// Whether the guest may give memory back, of which the process that fills it has to know: it reads an event for each range
/// (UFFD_EVENT_REMOVE), and fills it with zeros from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    /// It has a balloon, or memory that comes and goes.
    Some,
    /// It has none.
    None,
}

/// Makes memory as `layout` has it that is filled by the process that listens on `socket`.
///
/// # Errors
///
/// When there is nobody, or the host lacks something.
pub fn restore_by(
    socket: &str,
    layout: impl Into<Layout>,
    pages: PageSize,
    returns: Returns,
) -> Result<(Arc<GuestMemoryMmap>, External), ExternalError> {
    if pages == PageSize::Huge2Mib {
        return Err(ExternalError::HugePages);
    }
    let memory = allocate(layout, Backing::Anonymous, pages)?;
    let userfault = match returns {
        Returns::Some => Userfault::telling_of_removal(),
        Returns::None => Userfault::new(),
    }?;
    let mappings = mappings(&memory);
    for mapping in &mappings {
        userfault.guard(HostRange {
            start: mapping.base_host_virt_addr,
            len_bytes: mapping.size,
        })?;
    }
    let message = serde_json::to_vec(&mappings).expect("numbers are JSON");
    hand_over(socket, &message, &userfault).map_err(|errno| ExternalError::Socket {
        socket: socket.to_owned(),
        source: errno.into(),
    })?;
    // From now on pages may be there, and others not.
    let userfault = Box::leak(Box::new(userfault));
    Ok((
        memory,
        External {
            _userfault: userfault,
        },
    ))
}

fn mappings(memory: &GuestMemoryMmap) -> Vec<Mapping> {
    let mut offset = 0;
    let mapping = |slot: super::Slot| {
        let mapping = Mapping {
            base_host_virt_addr: slot.host_address,
            size: slot.size_bytes,
            offset,
            page_size: PAGE_BYTES,
            page_size_kib: PAGE_BYTES,
        };
        offset += slot.size_bytes;
        mapping
    };
    slots(memory).map(mapping).collect()
}

fn hand_over(path: &str, message: &[u8], userfault: &Userfault) -> rustix::io::Result<()> {
    let socket = connected(path)?;
    let descriptors = [userfault.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let has_room = control.push(SendAncillaryMessage::ScmRights(&descriptors));
    assert!(has_room, "there is room for one descriptor");
    let sent = sendmsg(
        &socket,
        &[IoSlice::new(message)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    if sent < message.len() {
        // A few hundred bytes on a fresh connection go at once.
        return Err(rustix::io::Errno::MSGSIZE);
    }
    Ok(())
}

fn connected(path: &str) -> rustix::io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // It holds for connecting as well: somebody may listen, and never accept.
    set_socket_timeout(&socket, Timeout::Send, Some(Duration::from_millis(ACCEPT_MS_MAX)))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::IoSliceMut;
    use std::os::unix::net::UnixListener;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::testing::{touch, waits};

    /// Takes one message as a handler does: the mappings, and the userfaultfd.
    fn accept(listener: &UnixListener) -> (serde_json::Value, Userfault) {
        let (stream, _) = listener.accept().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut message = vec![0; 4096];
        let mut pieces = [IoSliceMut::new(&mut message)];
        let received = recvmsg(&stream, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        let fd = control.drain().find_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        message.truncate(received.bytes);
        (
            serde_json::from_slice(&message).unwrap(),
            Userfault::from(fd.unwrap()),
        )
    }

    #[test]
    fn the_process_that_listens_is_told_the_mappings_and_fills_what_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("uffd.sock").to_str().unwrap().to_owned();
        let listener = UnixListener::bind(&path).unwrap();
        let handler = std::thread::spawn(move || accept(&listener));
        let (memory, external) = restore_by(&path, 4 << 10, PageSize::Base, Returns::None).unwrap();
        let (mappings, userfault) = handler.join().unwrap();
        let number = |at: usize, name: &str| mappings.get(at).unwrap().get(name).unwrap().as_u64().unwrap();
        let slots: Vec<_> = slots(&memory).collect();
        assert_eq!(mappings.as_array().unwrap().len(), slots.len());
        for (at, slot) in slots.iter().enumerate() {
            assert_eq!(number(at, "base_host_virt_addr"), slot.host_address);
            assert_eq!(number(at, "size"), slot.size_bytes);
            assert_eq!(
                (number(at, "page_size"), number(at, "page_size_kib")),
                (4096, 4096)
            );
        }
        assert_eq!((number(0, "offset"), number(1, "offset")), (0, 3 << 30));

        let touched = touch(&memory, 5 * PAGE_BYTES);
        assert!(waits(&touched));
        let mut faults = Vec::new();
        userfault.faults(&mut faults).unwrap();
        assert_eq!(faults, [number(0, "base_host_virt_addr") + 5 * PAGE_BYTES as u64]);
        userfault
            .fill(*faults.first().unwrap(), &[0x5e; PAGE_BYTES])
            .unwrap();
        assert_eq!(touched.recv_timeout(Duration::from_secs(5)), Ok(0x5e));
        // The other process dies; nobody sees zeros.
        drop((userfault, external));
        assert!(waits(&touch(&memory, 9 * PAGE_BYTES)));
    }

    #[test]
    fn the_process_that_fills_memory_is_told_what_the_guest_gives_back() {
        const REMOVE: u8 = 0x15;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("uffd.sock").to_str().unwrap().to_owned();
        let listener = UnixListener::bind(&path).unwrap();
        let handler = std::thread::spawn(move || accept(&listener));
        let (memory, _external) = restore_by(&path, 1, PageSize::Base, Returns::Some).unwrap();
        let (_, userfault) = handler.join().unwrap();
        let start = slots(&memory).next().unwrap().host_address;
        let page = PAGE_BYTES as u64;
        userfault.fill(start, &[7; 4 * PAGE_BYTES]).unwrap();
        let given_back = Arc::clone(&memory);
        let guest = std::thread::spawn(move || {
            crate::memory::discard(&given_back, GuestAddress(page), 2 * PAGE_BYTES).unwrap();
        });
        let mut message = [0; 32];
        while rustix::io::read(&userfault, &mut message).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        guest.join().unwrap();
        assert_eq!(message.first(), Some(&REMOVE));
        let words: Vec<u64> = message
            .as_chunks()
            .0
            .iter()
            .map(|word| u64::from_ne_bytes(*word))
            .collect();
        assert_eq!(words.get(1..3), Some(&[start + page, start + 3 * page][..]));
        // From then on the pages are absent.
        let touched = touch(&memory, 2 * PAGE_BYTES);
        assert!(waits(&touched));
        userfault
            .zero(crate::memory::userfault::HostRange {
                start: start + page,
                len_bytes: 2 * page,
            })
            .unwrap();
        assert_eq!(touched.recv_timeout(Duration::from_secs(5)), Ok(0));
    }

    #[test]
    fn where_nobody_listens_the_error_names_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("uffd.sock").to_str().unwrap().to_owned();
        let refused = restore_by(&path, 1, PageSize::Base, Returns::None).unwrap_err();
        assert!(refused.to_string().contains(&path), "{refused}");
        let huge = restore_by(&path, 2, PageSize::Huge2Mib, Returns::None).unwrap_err();
        assert!(matches!(huge, ExternalError::HugePages));
    }
}
