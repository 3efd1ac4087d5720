#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::nfs::rpc::Reply;
use crate::nfs::v4::Name;
use crate::nfs::xdr::Xdr;

fn any_handle() -> impl Strategy<Value = FileHandle> {
    vec(any::<u8>(), 0..=FileHandle::BYTES_MAX).prop_map(|bytes| FileHandle::new(&bytes).unwrap())
}

fn any_attributes() -> impl Strategy<Value = Attributes> {
    any::<([u32; 4], [u64; 4], [u8; 8])>().prop_map(|([mode, nlink, uid, gid], hypers, rdev)| {
        let [size, used, fsid, fileid] = hypers;
        let time = |seconds| Time {
            seconds,
            nseconds: mode,
        };
        Attributes {
            file_type: FileType::Regular,
            mode,
            nlink,
            uid,
            gid,
            size,
            used,
            rdev,
            fsid,
            fileid,
            atime: time(1),
            mtime: time(2),
            ctime: time(nlink),
        }
    })
}

fn any_fsinfo() -> impl Strategy<Value = FsinfoResult> {
    (prop::option::of(any_attributes()), any::<[u32; 8]>()).prop_map(|(attributes, words)| {
        let [rtmax, rtpref, rtmult, wtmax, wtpref, wtmult, dtpref, properties] = words;
        FsinfoResult {
            attributes,
            rtmax,
            rtpref,
            rtmult,
            wtmax,
            wtpref,
            wtmult,
            dtpref,
            maxfilesize: u64::from(rtmax) << 9,
            time_delta: Time::default(),
            properties,
        }
    })
}

fn any_exports() -> impl Strategy<Value = Exports> {
    let bytes = |len_max| vec(any::<u8>(), 0..len_max);
    let export = (bytes(100), vec(bytes(30), 0..3)).prop_map(|(path, groups)| Export {
        path: MountPath(path),
        groups,
    });
    vec(export, 0..4).prop_map(Exports)
}

/// It is read as it was written, and nothing that is cut off is.
fn goes_both_ways<T: Xdr + PartialEq + std::fmt::Debug>(value: &T) {
    let mut writer = Writer::default();
    value.put(&mut writer);
    assert_eq!(parse::<T>(writer.bytes()).as_ref(), Ok(value));
    for len in 0..writer.len_bytes() {
        assert_eq!(
            parse::<T>(writer.bytes().get(..len).unwrap()),
            Err(XdrError::Short)
        );
    }
}

fn answers_both_ways<T>(value: &T)
where
    T: for<'a> Answer<'a, Status = Status> + PartialEq + std::fmt::Debug,
{
    let mut writer = Writer::default();
    T::answer(Ok(value), &mut writer);
    assert_eq!(T::parse(writer.bytes()).unwrap().as_ref(), Ok(value));
    let mut writer = Writer::default();
    T::answer(Err(Status::STALE), &mut writer);
    assert_eq!(T::parse(writer.bytes()), Ok(Err(Status::STALE)));
}

proptest! {
    #[test]
    fn arguments_are_read_as_they_were_written(
        (program, version, offset, count) in any::<(u32, u32, u64, u32)>(),
        handle in any_handle(),
        path in vec(any::<u8>(), 0..100),
        exports in any_exports(),
    ) {
        goes_both_ways(&Mapping::of(program, version));
        goes_both_ways(&MountPath(path));
        goes_both_ways(&exports);
        goes_both_ways(&Lookup { directory: handle, name: Name::new("a.img").unwrap() });
        goes_both_ways(&Read { handle, offset, count });
    }

    #[test]
    fn results_are_read_as_they_were_written(
        handle in any_handle(),
        attributes in any_attributes(),
        fsinfo in any_fsinfo(),
        flavors in vec(any::<u32>(), 0..5),
        is_there: bool,
    ) {
        answers_both_ways(&attributes);
        answers_both_ways(&fsinfo);
        answers_both_ways(&LookupResult {
            handle,
            attributes: is_there.then_some(attributes),
            directory_attributes: None,
        });
        let mounted = MountResult { handle, flavors };
        let mut writer = Writer::default();
        MountResult::answer(Ok(&mounted), &mut writer);
        prop_assert_eq!(MountResult::parse(writer.bytes()), Ok(Ok(mounted)));
    }

    #[test]
    fn the_data_of_a_read_are_found_as_soon_as_what_precedes_them_is_there(
        attributes in prop::option::of(any_attributes()),
        data in vec(any::<u8>(), 0..20),
        (xid, eof) in any::<(u32, bool)>(),
    ) {
        let mut writer = Writer::default();
        Reply { xid, outcome: Ok(()) }.put(&mut writer);
        let header_bytes = writer.len_bytes();
        let result = ReadResult { attributes, eof, data: &data };
        ReadResult::answer(Ok(&result), &mut writer);
        let bytes = writer.into_bytes();
        prop_assert_eq!(ReadResult::parse(bytes.get(header_bytes..).unwrap()), Ok(Ok(result)));
        let data_len = u32::try_from(data.len()).unwrap();
        let prefix_bytes = bytes.len() - data.len().next_multiple_of(4);
        let payload = ReadPayload { eof, data_len, prefix_bytes };
        prop_assert_eq!(payload.record_bytes(), Some(bytes.len()));
        prop_assert!(prefix_bytes <= PREFIX_BYTES_MAX);
        for len in 0..bytes.len() {
            let expected = (len >= prefix_bytes).then_some(ReadPrefix { xid, payload: Some(payload) });
            prop_assert_eq!(read_prefix(bytes.get(..len).unwrap()), Ok(expected));
        }
    }

    #[test]
    fn no_bytes_are_too_strange_to_be_looked_at(bytes: Vec<u8>) {
        let _ = read_prefix(&bytes);
        let _ = parse::<Exports>(&bytes);
        let _ = parse::<Lookup>(&bytes);
        let _ = MountResult::parse(&bytes);
        let _ = LookupResult::parse(&bytes);
        let _ = ReadResult::parse(&bytes);
        let _ = FsinfoResult::parse(&bytes);
    }
}

#[test]
fn a_read_that_failed_has_no_data() {
    let mut writer = Writer::default();
    let outcome = Ok(());
    Reply { xid: 3, outcome }.put(&mut writer);
    ReadResult::answer(Err(Status::JUKEBOX), &mut writer);
    let prefix = ReadPrefix {
        xid: 3,
        payload: None,
    };
    assert_eq!(read_prefix(writer.bytes()), Ok(Some(prefix)));
}

#[test]
fn a_read_with_two_lengths_is_refused() {
    let bytes = [0_u32, 0, 4, 1, 5, 0, 0].map(u32::to_be_bytes).concat();
    let error = XdrError::Value {
        field: "count",
        value: 4,
    };
    assert_eq!(ReadResult::parse(&bytes), Err(error));
}

/// RFC 1813, 3.3.19: with a different value in each field.
#[test]
fn each_field_of_what_a_server_can_do_is_where_its_section_puts_it() {
    let bytes = [0_u32, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
        .map(u32::to_be_bytes)
        .concat();
    let expected = FsinfoResult {
        attributes: None,
        rtmax: 1,
        rtpref: 2,
        rtmult: 3,
        wtmax: 4,
        wtpref: 5,
        wtmult: 6,
        dtpref: 7,
        maxfilesize: 8 << 32 | 9,
        time_delta: Time {
            seconds: 10,
            nseconds: 11,
        },
        properties: 12,
    };
    assert_eq!(FsinfoResult::parse(&bytes), Ok(Ok(expected)));
}

#[test]
fn a_mount_that_is_refused_says_why() {
    let mut writer = Writer::default();
    MountResult::answer(Err(MountStatus::ACCES), &mut writer);
    assert_eq!(MountResult::parse(writer.bytes()), Ok(Err(MountStatus::ACCES)));
    assert_eq!(MountStatus::ACCES.to_string(), "MNT3ERR_ACCES");
    assert_eq!(MountStatus(99).to_string(), "status 99");
}
