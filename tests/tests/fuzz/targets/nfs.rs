//! What an NFS server may answer and ask, and what a user may write instead of a URL.

use coracle_storage::nfs::rpc::{Call, CallError, Direction, RECORD_MARK_BYTES, RecordMark, Reply};
use coracle_storage::nfs::url::{NfsUrl, URL_BYTES_MAX, UrlError};
use coracle_storage::nfs::v3;
use coracle_storage::nfs::v4::callback::{Callback, CallbackCompound, callback_reply};
use coracle_storage::nfs::v4::{
    Arguments, CallCompound, CompoundReply, PREFIX_BYTES_MAX, ReplyError, ReplyWriter, Results, read_prefix,
};
use coracle_storage::nfs::xdr::{Reader, Writer, Xdr, XdrError};

/// A record that is to be a reply, and the results of a compound behind its header; the latter without a header too.
pub(crate) fn run_reply(data: &[u8]) {
    if let Some(mark) = data.first_chunk::<RECORD_MARK_BYTES>()
        && let Ok(parsed) = RecordMark::parse(*mark, data.len())
    {
        assert_eq!(parsed.wire(), *mark);
        assert!(parsed.fragment_bytes <= data.len());
    }
    prefix(data);
    let mut reader = Reader::new(data);
    if let Ok(reply) = Reply::parse(&mut reader) {
        assert_eq!(Direction::of(data), Ok(Direction::Reply));
        let mut writer = Writer::default();
        reply.put(&mut writer);
        assert_eq!(Reply::parse(&mut Reader::new(writer.bytes())), Ok(reply));
        if let Err(error) = reply.outcome {
            drop(error.to_string());
        }
        compound(reader.rest());
    }
    compound(data);
    let _ = callback_reply(data);
}

/// The results are written as they were read.
fn compound(data: &[u8]) {
    let Ok((results, end)) = results(data) else {
        return;
    };
    if let Some(error) = end {
        drop((error.to_string(), error.status()));
        return;
    }
    let mut writer = Writer::default();
    let mut reply = ReplyWriter::new(&mut writer, b"");
    for result in &results {
        reply.put(result);
    }
    reply.finish();
    assert_eq!(self::results(writer.bytes()), Ok((results, None)));
}

type Pulled<'a> = (Vec<Results<'a>>, Option<ReplyError>);

fn results(data: &[u8]) -> Result<Pulled<'_>, XdrError> {
    let mut reply = CompoundReply::parse(data)?;
    let mut results = Vec::new();
    loop {
        match reply.results() {
            Ok(Some(result)) => results.push(result),
            Ok(None) => return Ok((results, None)),
            Err(error) => return Ok((results, Some(error))),
        }
    }
}

/// What is known of a reply with data does not depend on how much of it is there, and is what the whole of it says.
fn prefix(data: &[u8]) {
    let Ok(Some(prefix)) = read_prefix(data) else {
        let needs_more = read_prefix(data) == Ok(None);
        assert!(
            !needs_more || data.len() < PREFIX_BYTES_MAX,
            "so much is always enough"
        );
        return;
    };
    let Some(payload) = prefix.payload else {
        return;
    };
    let (before, behind) = data
        .split_at_checked(payload.prefix_bytes)
        .expect("data begin within what was looked at");
    assert!(before.len() <= PREFIX_BYTES_MAX);
    assert_eq!(read_prefix(before), Ok(Some(prefix)));
    let (_, less) = before.split_last().expect("a prefix has bytes");
    let cut = before.get(..less.len()).expect("it is shorter");
    assert_eq!(read_prefix(cut), Ok(None));
    if payload.record_bytes() != Some(data.len()) {
        return;
    }
    let mut reader = Reader::new(data);
    let reply = Reply::parse(&mut reader).expect("its prefix is one");
    assert_eq!(reply.xid, prefix.xid);
    let mut reply = CompoundReply::parse(reader.rest()).expect("its prefix is one");
    assert_eq!(reply.sequence(), Ok(payload.sequence));
    assert_eq!(reply.put_fh(), Ok(()));
    if let Ok(read) = reply.read() {
        assert_eq!(read.eof, payload.eof);
        assert!(
            std::ptr::eq(read.data.as_ptr(), behind.as_ptr()),
            "data are where they were said to be"
        );
    }
}

/// A record that is to be a call: of a server on the back channel, or of a client to the simulated server; and both without a
/// header.
pub(crate) fn run_callback(data: &[u8]) {
    let mut reader = Reader::new(data);
    match Call::parse(&mut reader) {
        Ok(call) => {
            assert_eq!(Direction::of(data), Ok(Direction::Call));
            let mut writer = Writer::default();
            call.as_ref().put(&mut writer);
            assert_eq!(Call::parse(&mut Reader::new(writer.bytes())), Ok(call));
            callbacks(reader.rest());
            calls(reader.rest());
        }
        Err(CallError::Version { rpc_version, .. }) => assert_ne!(rpc_version, 2),
        Err(CallError::Malformed(error)) => drop(error.to_string()),
    }
    callbacks(data);
    calls(data);
}

fn callbacks(data: &[u8]) {
    let Ok(call) = CallbackCompound::parse(data) else {
        return;
    };
    let unknown = |callback: &Callback| matches!(callback, Callback::Unknown(_));
    let known = call.operations.split_last().map_or(&[][..], |(_, known)| known);
    assert!(
        !known.iter().any(unknown),
        "nothing is read behind what is not known"
    );
    let mut writer = Writer::default();
    call.put(&mut writer);
    assert_eq!(CallbackCompound::parse(writer.bytes()), Ok(call));
}

fn calls(data: &[u8]) {
    let Ok(call) = CallCompound::parse(data) else {
        return;
    };
    let unknown = |operation: &Arguments<'_>| matches!(operation, Arguments::Unknown(_));
    let known = call.operations.split_last().map_or(&[][..], |(_, known)| known);
    assert!(
        !known.iter().any(unknown),
        "nothing is read behind what is not known"
    );
    let mut writer = Writer::default();
    writer.opaque(call.tag);
    writer.u32(call.minor_version);
    writer.len(call.operations.len());
    for operation in &call.operations {
        operation.put(&mut writer);
    }
    assert_eq!(CallCompound::parse(writer.bytes()), Ok(call));
}

/// What a server of NFSv3, or one that knows where it is, may answer.
pub(crate) fn run_v3(data: &[u8]) {
    goes_both_ways::<v3::Mapping>(data);
    goes_both_ways::<v3::MountPath>(data);
    goes_both_ways::<v3::Exports>(data);
    goes_both_ways::<v3::Lookup>(data);
    goes_both_ways::<v3::Read>(data);
    answers_both_ways::<v3::MountResult>(data);
    answers_both_ways::<v3::Attributes>(data);
    answers_both_ways::<v3::LookupResult>(data);
    answers_both_ways::<v3::FsinfoResult>(data);
    if let Ok(Ok(read)) = <v3::ReadResult<'_> as v3::Answer<'_>>::parse(data) {
        let mut writer = Writer::default();
        v3::Answer::answer(Ok(&read), &mut writer);
        assert_eq!(v3::Answer::parse(writer.bytes()), Ok(Ok(read)));
    }
    v3_prefix(data);
}

fn goes_both_ways<T: Xdr + PartialEq + std::fmt::Debug>(data: &[u8]) {
    if let Ok(value) = v3::parse::<T>(data) {
        let mut writer = Writer::default();
        value.put(&mut writer);
        assert_eq!(v3::parse(writer.bytes()), Ok(value));
    }
}

fn answers_both_ways<T>(data: &[u8])
where
    T: for<'a> v3::Answer<'a> + PartialEq + std::fmt::Debug,
{
    if let Ok(Ok(value)) = <T as v3::Answer<'_>>::parse(data) {
        let mut writer = Writer::default();
        v3::Answer::answer(Ok(&value), &mut writer);
        let read = <T as v3::Answer<'_>>::parse(writer.bytes());
        assert!(
            matches!(read, Ok(Ok(read)) if read == value),
            "{value:?} is read as it was written"
        );
    }
}

fn v3_prefix(data: &[u8]) {
    match v3::read_prefix(data) {
        Ok(None) => assert!(data.len() < v3::PREFIX_BYTES_MAX, "so much is always enough"),
        Ok(Some(prefix)) => {
            let Some(payload) = prefix.payload else {
                return;
            };
            let before = data.get(..payload.prefix_bytes);
            let before = before.expect("data begin within what was looked at");
            assert!(before.len() <= v3::PREFIX_BYTES_MAX);
            assert_eq!(v3::read_prefix(before), Ok(Some(prefix)));
        }
        Err(error) => drop(error.to_string()),
    }
}

/// What stands where a path or a URL is expected.
pub(crate) fn run_url(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    match text.parse::<NfsUrl>() {
        Ok(url) => {
            assert!(NfsUrl::is_url(text));
            let canonical = url.to_string();
            // What needs no escape may be given one, which makes it longer.
            let read = if canonical.len() > URL_BYTES_MAX {
                Err(UrlError::Long)
            } else {
                Ok(url.clone())
            };
            assert_eq!(canonical.parse(), read, "{canonical}");
            assert!(!url.image.path.components().is_empty());
        }
        Err(error) => drop(error.to_string()),
    }
}
