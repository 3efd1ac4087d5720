#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use proptest::prelude::*;

use super::*;

fn any_credential() -> impl Strategy<Value = Credential> {
    let sys = (
        any::<(u32, u32, u32)>(),
        prop::collection::vec(any::<u8>(), 0..=MACHINE_NAME_BYTES_MAX),
        prop::collection::vec(any::<u32>(), 0..=GROUPS_MAX),
    )
        .prop_map(|((stamp, uid, gid), machine_name, gids)| SysCredential {
            stamp,
            machine_name,
            uid,
            gid,
            gids,
        });
    prop_oneof![
        Just(Credential::None),
        sys.prop_map(Credential::Sys),
        (2_u32..).prop_map(Credential::Other),
    ]
}

fn any_outcome() -> impl Strategy<Value = Result<(), RpcError>> {
    let versions = any::<(u32, u32)>();
    prop_oneof![
        Just(Ok(())),
        versions.prop_map(|(low, high)| Err(RpcError::RpcMismatch { low, high })),
        any::<u32>().prop_map(|stat| Err(RpcError::Auth(stat))),
        Just(Err(RpcError::ProgramUnavailable)),
        versions.prop_map(|(low, high)| Err(RpcError::ProgramMismatch { low, high })),
        Just(Err(RpcError::ProcedureUnavailable)),
        Just(Err(RpcError::GarbageArguments)),
        Just(Err(RpcError::System)),
    ]
}

proptest! {
    #[test]
    fn a_call_is_read_as_it_was_written(
        (xid, program, version, procedure) in any::<(u32, u32, u32, u32)>(),
        credential in any_credential(),
    ) {
        let call = Call { xid, program, version, procedure, credential };
        let mut writer = Writer::default();
        call.as_ref().put(&mut writer);
        prop_assert_eq!(Direction::of(writer.bytes()), Ok(Direction::Call));
        let mut reader = Reader::new(writer.bytes());
        prop_assert_eq!(Call::parse(&mut reader), Ok(call));
        prop_assert_eq!(reader.end(), Ok(()));
        for len in 0..writer.len_bytes() {
            let cut = writer.bytes().get(..len).unwrap();
            prop_assert_eq!(Call::parse(&mut Reader::new(cut)), Err(CallError::Malformed(XdrError::Short)));
        }
    }

    #[test]
    fn a_reply_is_read_as_it_was_written(xid: u32, outcome in any_outcome()) {
        let reply = Reply { xid, outcome };
        let mut writer = Writer::default();
        reply.put(&mut writer);
        prop_assert_eq!(Direction::of(writer.bytes()), Ok(Direction::Reply));
        let mut reader = Reader::new(writer.bytes());
        prop_assert_eq!(Reply::parse(&mut reader), Ok(reply));
        prop_assert_eq!(reader.end(), Ok(()));
        for len in 0..writer.len_bytes() {
            let cut = writer.bytes().get(..len).unwrap();
            prop_assert_eq!(Reply::parse(&mut Reader::new(cut)), Err(XdrError::Short));
        }
    }

    #[test]
    fn a_mark_is_read_as_it_was_written(is_last: bool, fragment_bytes in 1_usize..1 << 31) {
        let mark = RecordMark { is_last, fragment_bytes };
        prop_assert_eq!(RecordMark::parse(mark.wire(), fragment_bytes), Ok(mark));
        let long = RecordError::Long { fragment_bytes, room_bytes: fragment_bytes - 1 };
        prop_assert_eq!(RecordMark::parse(mark.wire(), fragment_bytes - 1), Err(long));
    }

    #[test]
    fn no_header_is_too_strange_to_be_looked_at(bytes: Vec<u8>) {
        let _ = Call::parse(&mut Reader::new(&bytes));
        let _ = Reply::parse(&mut Reader::new(&bytes));
    }
}

/// The diagrams of RFC 5531, 9 and appendix A, with a different value in each field.
#[test]
fn each_field_of_a_call_is_where_its_section_puts_it() {
    let credential = Credential::Sys(SysCredential {
        stamp: 0x11,
        machine_name: b"vm-a1".to_vec(),
        uid: 0x12,
        gid: 0x13,
        gids: vec![0x14, 0x15],
    });
    let call = Call {
        xid: 0x0102_0304,
        program: program::NFS,
        version: 4,
        procedure: 1,
        credential: &credential,
    };
    let mut writer = Writer::default();
    call.put(&mut writer);
    let words: &[u32] = &[
        0x0102_0304,
        0,
        2,
        100_003,
        4,
        1,
        1,
        36,
        0x11,
        5,
        0x766d_2d61,
        0x3100_0000,
        0x12,
        0x13,
        2,
        0x14,
        0x15,
        0,
        0,
    ];
    assert_eq!(
        writer.into_bytes(),
        words.iter().flat_map(|it| it.to_be_bytes()).collect::<Vec<u8>>()
    );
}

#[test]
fn a_call_of_another_version_of_rpc_can_be_answered() {
    let bytes = [7_u32, 0, 3].map(u32::to_be_bytes).concat();
    let error = CallError::Version {
        xid: 7,
        rpc_version: 3,
    };
    assert_eq!(Call::parse(&mut Reader::new(&bytes)), Err(error));
}

#[test]
fn a_verifier_that_is_too_long_is_refused_before_it_is_there() {
    let bytes = [7_u32, 1, 0, 0, 401].map(u32::to_be_bytes).concat();
    let error = XdrError::Long {
        len: 401,
        len_max: AUTH_BODY_BYTES_MAX,
    };
    assert_eq!(Reply::parse(&mut Reader::new(&bytes)), Err(error));
}

#[test]
fn fragments_go_on_and_end() {
    assert_eq!(RecordMark::parse([0; 4], 9), Err(RecordError::Empty));
    let empty = RecordMark {
        is_last: true,
        fragment_bytes: 0,
    };
    assert_eq!(RecordMark::parse([0x80, 0, 0, 0], 0), Ok(empty));
}

#[test]
fn a_record_counts_what_is_sent_behind_it() {
    let mut writer = Writer::default();
    writer.u32(1);
    let record = Record::begin(&mut writer);
    writer.u64(2);
    assert_eq!(record.finish(&mut writer, 100), 108);
    assert_eq!(writer.bytes().get(4..8), Some(&[0x80, 0, 0, 108][..]));
}
