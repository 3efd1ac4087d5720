//! Requests of the driver, and what they are answered (5.15.6).

use super::blocks::BlockState;

/// Bytes of `struct virtio_mem_req`.
pub(super) const REQUEST_BYTES: usize = 24;
/// Bytes of `struct virtio_mem_resp`.
pub(super) const RESPONSE_BYTES: usize = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// VIRTIO_MEM_REQ_PLUG
    Plug(RequestedRange),
    /// VIRTIO_MEM_REQ_UNPLUG
    Unplug(RequestedRange),
    /// VIRTIO_MEM_REQ_UNPLUG_ALL
    UnplugAll,
    /// VIRTIO_MEM_REQ_STATE
    State(RequestedRange),
}

/// Blocks, as the driver names them; nothing of it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestedRange {
    /// The guest address of the first.
    pub address: u64,
    /// How many.
    pub blocks: u16,
}

impl Request {
    /// Reads a request; `None` if it is too short, or of no kind that there is. What follows it is not looked at.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<REQUEST_BYTES>()?;
        let half = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let range = || {
            Some(RequestedRange {
                address: u64::from_le_bytes(*bytes.get(8..)?.first_chunk()?),
                blocks: half(16)?,
            })
        };
        match half(0)? {
            PLUG => range().map(Self::Plug),
            UNPLUG => range().map(Self::Unplug),
            UNPLUG_ALL => Some(Self::UnplugAll),
            STATE => range().map(Self::State),
            _ => None,
        }
    }
}

/// What a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    /// It was done.
    Ack,
    /// The same, of [`Request::State`].
    State(BlockState),
    /// Not what is requested of the guest.
    Nack,
    /// The host cannot, for now.
    Busy,
    /// It makes no sense.
    Error,
}

impl Response {
    pub(super) fn to_bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::State(BlockState::Plugged) => (0, 0),
            Self::State(BlockState::Unplugged) => (0, 1),
            Self::State(BlockState::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0_u8),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(kind: u8) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0xa5; REQUEST_BYTES];
        let head = [kind, 0, 1, 2, 3, 4, 5, 6, 8, 7, 6, 5, 4, 3, 2, 1, 0x34, 0x12];
        for (to, byte) in bytes.iter_mut().zip(head) {
            *to = byte;
        }
        bytes
    }

    #[test]
    fn requests_are_read_as_the_standard_lays_them_out() {
        let range = RequestedRange {
            address: 0x0102_0304_0506_0708,
            blocks: 0x1234,
        };
        assert_eq!(Request::parse(&bytes(0)), Some(Request::Plug(range)));
        assert_eq!(Request::parse(&bytes(1)), Some(Request::Unplug(range)));
        assert_eq!(Request::parse(&bytes(2)), Some(Request::UnplugAll));
        assert_eq!(Request::parse(&bytes(3)), Some(Request::State(range)));
        assert_eq!(Request::parse(&bytes(4)), None);
        let mut high = bytes(0);
        high[1] = 1;
        assert_eq!(Request::parse(&high), None);
        assert_eq!(Request::parse(&bytes(0)[..REQUEST_BYTES - 1]), None);
    }

    #[test]
    fn answers_are_written_as_the_standard_lays_them_out() {
        for (response, kind, state) in [
            (Response::Ack, 0, 0),
            (Response::State(BlockState::Plugged), 0, 0),
            (Response::State(BlockState::Unplugged), 0, 1),
            (Response::State(BlockState::Mixed), 0, 2),
            (Response::Nack, 1, 0),
            (Response::Busy, 2, 0),
            (Response::Error, 3, 0),
        ] {
            let bytes = response.to_bytes();
            assert_eq!((bytes[0], bytes[8]), (kind, state), "{response:?}");
            assert!(bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>() == u32::from(kind + state));
        }
    }
}
