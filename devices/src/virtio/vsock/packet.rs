//! Packets (5.10.6): what goes through the queues, by its header.

use coracle_storage::request::Segment;

use crate::virtio::segments;

/// `struct virtio_vsock_hdr`.
pub(super) const HEADER_BYTES: usize = 44;
/// The host's CID (VMADDR_CID_HOST).
pub(super) const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM, the only type that is offered.
pub(super) const TYPE_STREAM: u16 = 1;

/// VIRTIO_VSOCK_OP_*.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Flag of SHUTDOWN: whoever sends it receives no more (VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE).
pub(super) const ENDS_RECEIVING: u32 = 1;
/// Flag of SHUTDOWN: whoever sends it sends no more (VIRTIO_VSOCK_SHUTDOWN_F_SEND).
pub(super) const ENDS_SENDING: u32 = 2;
/// Both.
pub(super) const ENDS_ALL: u32 = ENDS_RECEIVING | ENDS_SENDING;

/// The header of a packet. All of it is anybody's guess when it comes from a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data behind the header.
    pub(super) len_bytes: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// How much the sender keeps for this connection, in bytes.
    pub(super) buf_alloc: u32,
    /// How much of what it has received it has passed on, in bytes, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Reads one, once; `None` if there is not so much.
    pub(super) fn read(from: &[Segment]) -> Option<Self> {
        let mut bytes = [0; HEADER_BYTES];
        if segments::gather(from, 0, &mut bytes) < HEADER_BYTES {
            return None;
        }
        let mut rest = bytes.as_slice();
        Some(Self {
            src_cid: u64::from_le_bytes(field(&mut rest)),
            dst_cid: u64::from_le_bytes(field(&mut rest)),
            src_port: u32::from_le_bytes(field(&mut rest)),
            dst_port: u32::from_le_bytes(field(&mut rest)),
            len_bytes: u32::from_le_bytes(field(&mut rest)),
            kind: u16::from_le_bytes(field(&mut rest)),
            op: u16::from_le_bytes(field(&mut rest)),
            flags: u32::from_le_bytes(field(&mut rest)),
            buf_alloc: u32::from_le_bytes(field(&mut rest)),
            fwd_cnt: u32::from_le_bytes(field(&mut rest)),
        })
    }

    /// As it is written.
    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len_bytes.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_BYTES];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// What says to its sender that there is no such connection (5.10.6.2), of whatever type it was.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// Takes the next field.
fn field<const BYTES: usize>(rest: &mut &[u8]) -> [u8; BYTES] {
    let (field, left) = rest
        .split_first_chunk()
        .expect("the fields are as long as the header");
    *rest = left;
    *field
}
