//! One message of ONC RPC as bytes: the fragments that carry it (RFC 5531, 11), its header, and XDR (RFC 4506) from its
//! front.

/// What of a message is not read yet; nothing comes of fields that are not there.
#[derive(Clone, Debug)]
pub(super) struct Xdr<'a> {
    content: &'a [u8],
    at: usize,
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// A procedure is called.
    Call {
        program: u32,
        version: u32,
        procedure: u32,
    },
    /// A call was done, so its results follow.
    Done,
    /// A call was not done.
    Refused,
}

/// The program of NFS; a server's callbacks are of another.
pub(super) const NFS: u32 = 100_003;
/// In the mark of a fragment: it is the last one.
pub(super) const LAST: u32 = 1 << 31;
pub(super) const MARK_BYTES: usize = 4;

impl<'a> Xdr<'a> {
    pub(super) fn new(content: &'a [u8]) -> Self {
        Self { content, at: 0 }
    }

    /// Where in the content it is.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// So many bytes, and no padding.
    pub(super) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let found = self.content.get(self.at..end)?;
        self.at = end;
        Some(found)
    }

    pub(super) fn word(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }

    pub(super) fn long(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.bytes(8)?.try_into().ok()?))
    }

    /// As many as it says of itself, without the padding that follows.
    pub(super) fn opaque(&mut self) -> Option<&'a [u8]> {
        let count = usize::try_from(self.word()?).ok()?;
        let found = self.bytes(count)?;
        self.bytes(count.next_multiple_of(4) - count)?;
        Some(found)
    }

    /// A list of words, such as a bitmap.
    pub(super) fn words(&mut self) -> Option<()> {
        let count = usize::try_from(self.word()?).ok()?;
        self.bytes(count.checked_mul(4)?).map(drop)
    }

    /// The transaction, and what the message is; its body follows.
    pub(super) fn header(&mut self) -> Option<(u32, Header)> {
        let xid = self.word()?;
        let header = if self.word()? == 0 {
            let [_, program, version, procedure] = [self.word()?, self.word()?, self.word()?, self.word()?];
            // Who calls, and how he proves it.
            for _ in 0..2 {
                self.word()?;
                self.opaque()?;
            }
            Header::Call {
                program,
                version,
                procedure,
            }
        } else if self.word()? == 0 {
            self.word()?;
            self.opaque()?;
            if self.word()? == 0 {
                Header::Done
            } else {
                Header::Refused
            }
        } else {
            Header::Refused
        };
        Some((xid, header))
    }
}

/// The length of the first record in the stream with all its fragments, when enough is there to tell.
pub(super) fn first_bytes(stream: &[u8]) -> Option<usize> {
    let mut end = 0_usize;
    loop {
        let mark = Xdr::new(stream.get(end..)?).word()?;
        let length = usize::try_from(mark & !LAST).ok()?;
        end = end.checked_add(MARK_BYTES)?.checked_add(length)?;
        if mark & LAST != 0 {
            return Some(end);
        }
    }
}

/// What the fragments of a record carry.
pub(super) fn content(record: &[u8]) -> Vec<u8> {
    let mut rest = Xdr::new(record);
    let mut content = Vec::new();
    while let Some(mark) = rest.word() {
        let length = usize::try_from(mark & !LAST).unwrap_or(usize::MAX);
        match rest.bytes(length) {
            Some(fragment) => content.extend_from_slice(fragment),
            None => break,
        }
    }
    content
}

/// A record of one fragment.
pub(super) fn sealed(content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).expect("a message is far shorter than 2 GiB");
    [&(LAST | length).to_be_bytes(), content].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_as_long_as_all_its_fragments() {
        let stream = [
            &[0, 0, 0, 2][..],
            b"ab",
            &[0x80, 0, 0, 3],
            b"cde",
            &[0x80, 0, 0, 1],
        ]
        .concat();
        assert_eq!(first_bytes(&stream), Some(13));
        let cut = |length| first_bytes(stream.get(..length).expect("it is longer"));
        assert_eq!(cut(9), None, "a mark is not whole");
        assert_eq!(cut(11), Some(13), "the marks are enough");
        assert_eq!(content(stream.get(..13).expect("it is longer")), b"abcde");
        assert_eq!(sealed(b"abcde"), [&[0x80, 0, 0, 5][..], b"abcde"].concat());
    }

    #[test]
    fn a_field_that_is_not_there_is_nothing_whatever_it_says_of_itself() {
        for content in [&[][..], &[0, 0, 0], &[0xff; 4], &[0, 0, 0, 5, 1, 2, 3, 4, 5]] {
            assert!(Xdr::new(content).opaque().is_none(), "{content:?}");
        }
        assert!(Xdr::new(&[0xff; 8]).words().is_none());
        let mut padded = Xdr::new(&[0, 0, 0, 1, 7, 0, 0, 0, 9]);
        assert_eq!(padded.opaque(), Some(&[7][..]));
        assert_eq!(padded.at(), 8);
    }
}
