#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

mod any;

use proptest::prelude::*;

use super::attributes::number;
use super::callback::{Callback, CallbackCompound, CbSequenceResult, callback_reply};
use super::*;
use crate::nfs::rpc::{Reply, RpcError};
use crate::nfs::xdr::{Reader, Writer, XdrError, padding_bytes};

const STATEID: Stateid = Stateid {
    seqid: 1,
    other: *b"the open it.",
};

const SEQUENCE: Sequence = Sequence {
    session_id: SessionId(*b"0123456789abcdef"),
    sequence_id: 7,
    slot_id: 3,
    highest_slot_id: 9,
    cache_this: true,
};

const SLOT: SequenceResult = SequenceResult {
    session_id: SEQUENCE.session_id,
    sequence_id: 7,
    slot_id: 3,
    highest_slot_id: 31,
    target_highest_slot_id: 30,
    status_flags: SequenceResult::RESTART_RECLAIM_NEEDED,
};

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// RFC 8881, 18.46, 18.19 and 18.32, with a different value in each field.
#[test]
fn a_write_is_written_field_by_field_as_its_section_has_it() {
    let mut writer = Writer::default();
    let mut compound = Compound::new(&mut writer, "", 1);
    compound.sequence(&SEQUENCE);
    compound.put_fh(&FileHandle::new(b"file!").unwrap());
    compound.write(STATEID, 0x40_0000_0001, Stability::FileSync, 5);
    let expected = [
        words(&[0, 1, 3, 53]),
        b"0123456789abcdef".to_vec(),
        words(&[7, 3, 9, 1, 22, 5]),
        b"file!\0\0\0".to_vec(),
        words(&[38, 1]),
        b"the open it.".to_vec(),
        words(&[0x40, 1, 2, 5]),
    ];
    assert_eq!(writer.bytes(), expected.concat());

    let mut received = writer.into_bytes();
    received.extend_from_slice(b"hello\0\0\0");
    let call = CallCompound::parse(&received).unwrap();
    let write = Write {
        stateid: STATEID,
        offset: 0x40_0000_0001,
        stability: Stability::FileSync,
        data: b"hello",
    };
    assert_eq!(call.operations.last(), Some(&Arguments::Write(write)));
}

/// RFC 8881, 18.16 and 18.10.
#[test]
fn an_open_and_a_lock_are_written_as_their_sections_have_them() {
    let owner = StateOwner {
        client_id: ClientId(5),
        owner: b"vm-1".to_vec(),
    };
    let mut writer = Writer::default();
    let mut compound = Compound::new(&mut writer, "t", 2);
    compound.open(&Open {
        seqid: 0,
        share_access: ShareAccess::BOTH.without_delegation(),
        share_deny: ShareDeny::Write,
        owner: owner.clone(),
        how: OpenHow::Create(CreateHow::Guarded(Attributes {
            size: Some(6),
            mode: Some(0o600),
            ..Attributes::default()
        })),
        claim: OpenClaim::Null(Name::new("a.img").unwrap()),
    });
    compound.lock(&Lock {
        lock_type: LockType::Write,
        reclaim: false,
        offset: 8,
        length: 1,
        locker: Locker::New {
            open_seqid: 0,
            open_stateid: Stateid::CURRENT,
            lock_seqid: 0,
            lock_owner: owner,
        },
    });
    compound.finish();
    let expected = [
        words(&[1, 0x7400_0000, 2, 2]),
        // Owner, GUARDED4, the bitmap of size and mode, and their values.
        words(&[
            18,
            0,
            0x403,
            2,
            0,
            5,
            4,
            0x766d_2d31,
            1,
            1,
            2,
            0x10,
            2,
            12,
            0,
            6,
            0o600,
        ]),
        words(&[0, 5, 0x612e_696d, 0x6700_0000]),
        words(&[12, 2, 0, 0, 8, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 5, 4, 0x766d_2d31]),
    ];
    assert_eq!(writer.into_bytes(), expected.concat());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_compound_is_received_as_it_was_sent(operations in any::operations()) {
        let mut writer = Writer::default();
        writer.opaque(b"tag");
        writer.u32(2);
        writer.len(operations.len());
        for operation in &operations {
            operation.put(&mut writer);
        }
        let call = CallCompound::parse(writer.bytes()).unwrap();
        prop_assert_eq!(call.tag, b"tag");
        prop_assert_eq!(call.minor_version, 2);
        prop_assert_eq!(&call.operations, &operations);
        for len in 0..writer.len_bytes() {
            let cut = writer.bytes().get(..len).unwrap();
            prop_assert_eq!(CallCompound::parse(cut), Err(XdrError::Short));
        }
    }

    #[test]
    fn an_answer_is_received_as_it_was_sent(results in any::results()) {
        let mut writer = Writer::default();
        let mut reply = ReplyWriter::new(&mut writer, b"tag");
        for result in &results {
            reply.put(result);
        }
        reply.finish();
        let mut reply = CompoundReply::parse(writer.bytes()).unwrap();
        prop_assert_eq!(reply.status(), Status::OK);
        for result in &results {
            let found = reply.results().unwrap();
            prop_assert_eq!(found.as_ref(), Some(result));
        }
        prop_assert_eq!(reply.results().unwrap(), None);
        prop_assert_eq!(reply.end(), Ok(()));
        for len in 0..writer.len_bytes() {
            let cut = writer.bytes().get(..len).unwrap();
            prop_assert!(all_results(cut).is_err());
        }
    }

    #[test]
    fn no_bytes_are_too_strange_to_be_looked_at(bytes: Vec<u8>) {
        let _ = all_results(&bytes);
        let _ = read_prefix(&bytes);
        let _ = CallCompound::parse(&bytes);
        let _ = CallbackCompound::parse(&bytes);
        let _ = callback_reply(&bytes);
    }

    #[test]
    fn a_callback_is_received_as_it_was_sent(operations in any::callbacks()) {
        let call = CallbackCompound { tag: b"t", minor_version: 1, operations };
        let mut writer = Writer::default();
        call.put(&mut writer);
        prop_assert_eq!(CallbackCompound::parse(writer.bytes()), Ok(call));
        for len in 0..writer.len_bytes() {
            let cut = writer.bytes().get(..len).unwrap();
            prop_assert_eq!(CallbackCompound::parse(cut), Err(XdrError::Short));
        }
    }
}

fn all_results(bytes: &[u8]) -> Result<usize, ReplyError> {
    let mut reply = CompoundReply::parse(bytes)?;
    let mut count = 0;
    while reply.results()?.is_some() {
        count += 1;
    }
    Ok(count)
}

#[test]
fn an_operation_that_failed_is_told_with_its_status() {
    let mut writer = Writer::default();
    let mut reply = ReplyWriter::new(&mut writer, b"");
    reply.put(&Results::Sequence(SLOT));
    reply.failed(Operation::PUTFH, Status::STALE);
    let mut reply = CompoundReply::parse(writer.bytes()).unwrap();
    assert_eq!(reply.status(), Status::STALE);
    assert_eq!(reply.sequence(), Ok(SLOT));
    let error = reply.put_fh().unwrap_err();
    assert_eq!(error.status(), Some(Status::STALE));
    assert_eq!(error.to_string(), "the server answered PUTFH with NFS4ERR_STALE");
}

#[test]
fn a_lock_that_is_denied_names_who_has_it() {
    let denied = LockDenied {
        offset: 3,
        length: 4,
        lock_type: LockType::Read,
        owner: StateOwner {
            client_id: ClientId(9),
            owner: b"host-b".to_vec(),
        },
    };
    let mut writer = Writer::default();
    ReplyWriter::new(&mut writer, b"").denied(&denied);
    let mut reply = CompoundReply::parse(writer.bytes()).unwrap();
    assert_eq!(reply.lock(), Err(ReplyError::Denied(denied)));
    assert_eq!(reply.end(), Ok(()));
}

#[test]
fn a_compound_that_is_refused_as_a_whole_fails_its_first_operation() {
    let mut writer = Writer::default();
    ReplyWriter::new(&mut writer, b"").refused(Status::MINOR_VERS_MISMATCH);
    let mut reply = CompoundReply::parse(writer.bytes()).unwrap();
    let error = ReplyError::Status {
        operation: Operation::EXCHANGE_ID,
        status: Status::MINOR_VERS_MISMATCH,
    };
    assert_eq!(reply.exchange_id(), Err(error));
}

#[test]
fn an_operation_that_the_server_does_not_know_is_refused_as_such() {
    let mut writer = Writer::default();
    ReplyWriter::new(&mut writer, b"").failed(Operation::ILLEGAL, Status::OP_ILLEGAL);
    let error = ReplyError::Status {
        operation: Operation::CLONE,
        status: Status::OP_ILLEGAL,
    };
    let mut reply = CompoundReply::parse(writer.bytes()).unwrap();
    assert_eq!(reply.clone_range(), Err(error));
}

#[test]
fn an_answer_to_something_else_is_malformed() {
    let mut writer = Writer::default();
    let mut reply = ReplyWriter::new(&mut writer, b"");
    reply.put(&Results::Putfh);
    reply.finish();
    let reply = CompoundReply::parse(writer.bytes()).unwrap();
    let found = Operation::PUTFH;
    let expected = Operation::PUTROOTFH;
    assert_eq!(
        reply.clone().put_root_fh(),
        Err(MalformedReply::Operation { expected, found }.into())
    );
    let mut reply = reply;
    assert!(reply.end().is_err());
    assert_eq!(reply.put_fh(), Ok(()));
    assert_eq!(
        reply.get_fh(),
        Err(MalformedReply::Missing(Operation::GETFH).into())
    );
    // An error that is not the compound's.
    let bytes = words(&[0, 0, 1, 22, 70]);
    let error = CompoundReply::parse(&bytes).unwrap().put_fh();
    assert_eq!(error, Err(MalformedReply::Inconsistent(Operation::PUTFH).into()));
}

#[test]
fn nothing_may_be_set_and_the_answer_says_so_all_the_same() {
    let mut writer = Writer::default();
    ReplyWriter::new(&mut writer, b"").failed(Operation::SETATTR, Status::NOSPC);
    assert_eq!(writer.into_bytes(), words(&[28, 0, 1, 34, 28, 0]));
}

fn read_reply(verifier: &[u8], tag: &[u8], data: &[u8]) -> (Vec<u8>, usize) {
    let mut writer = Writer::default();
    for word in [0x0102_0304, 1, 0, 0] {
        writer.u32(word);
    }
    writer.opaque(verifier);
    writer.u32(0);
    let mut reply = ReplyWriter::new(&mut writer, tag);
    reply.put(&Results::Sequence(SLOT));
    reply.put(&Results::Putfh);
    reply.put(&Results::Read(ReadResult { eof: true, data }));
    reply.finish();
    let prefix_bytes = writer.len_bytes() - data.len() - padding_bytes(data.len());
    (writer.into_bytes(), prefix_bytes)
}

#[test]
fn the_data_of_a_read_are_found_as_soon_as_what_precedes_them_is_there() {
    let longest = [b'v'; 400];
    for (verifier, tag) in [
        (&b""[..], &b""[..]),
        (b"12345", b"tag"),
        (&longest, &[b't'; TAG_BYTES_MAX]),
    ] {
        let (bytes, prefix_bytes) = read_reply(verifier, tag, b"hello");
        let payload = ReadPayload {
            sequence: SLOT,
            eof: true,
            data_len: 5,
            prefix_bytes,
        };
        assert_eq!(payload.record_bytes(), Some(bytes.len()));
        for len in 0..bytes.len() {
            let expected = (len >= prefix_bytes).then_some(ReadPrefix {
                xid: 0x0102_0304,
                payload: Some(payload),
            });
            assert_eq!(read_prefix(bytes.get(..len).unwrap()), Ok(expected));
        }
    }
    let (bytes, prefix_bytes) = read_reply(&longest, &[b't'; TAG_BYTES_MAX], b"");
    assert_eq!((bytes.len(), prefix_bytes), (PREFIX_BYTES_MAX, PREFIX_BYTES_MAX));
}

#[test]
fn a_verifier_or_a_tag_that_is_too_long_is_refused_before_it_is_there() {
    let long = |len, len_max| Err(XdrError::Long { len, len_max });
    assert_eq!(read_prefix(&words(&[1, 1, 0, 0, 401])), long(401, 400));
    assert_eq!(
        read_prefix(&words(&[1, 1, 0, 0, 0, 0, 0, 129])),
        long(129, TAG_BYTES_MAX)
    );
    assert!(matches!(
        read_prefix(&words(&[1, 0])),
        Err(XdrError::Value { .. })
    ));
}

#[test]
fn a_reply_without_data_is_left_to_be_read_as_any_other() {
    let none = Ok(Some(ReadPrefix {
        xid: 6,
        payload: None,
    }));
    let mut writer = Writer::default();
    let outcome = Err(RpcError::GarbageArguments);
    Reply { xid: 6, outcome }.put(&mut writer);
    assert_eq!(read_prefix(writer.bytes()), none);

    let accepted = |put: &dyn Fn(ReplyWriter<'_>)| {
        let mut writer = Writer::default();
        Reply {
            xid: 6,
            outcome: Ok(()),
        }
        .put(&mut writer);
        put(ReplyWriter::new(&mut writer, b""));
        read_prefix(writer.bytes())
    };
    assert_eq!(
        accepted(&|reply| reply.failed(Operation::SEQUENCE, Status::DELAY)),
        none
    );
    assert_eq!(accepted(&|reply| reply.finish()), none);
    let three_others = accepted(&|mut reply| {
        reply.put(&Results::Sequence(SLOT));
        reply.put(&Results::Putfh);
        reply.put(&Results::Commit(Verifier([1; 8])));
        reply.finish();
    });
    assert_eq!(three_others, none);
}

#[test]
fn a_callback_that_is_not_done_here_is_refused_as_the_standard_says() {
    for (operation, answer) in [(7, [7, 10_004]), (15, [15, 10_004]), (99, [10_044, 10_044])] {
        let call = CallbackCompound {
            tag: b"",
            minor_version: 1,
            operations: vec![Callback::Unknown(operation)],
        };
        let mut writer = Writer::default();
        call.put(&mut writer);
        assert_eq!(CallbackCompound::parse(writer.bytes()), Ok(call));
        let mut writer = Writer::default();
        ReplyWriter::new(&mut writer, b"").cb_unknown(operation);
        let [number, status] = answer;
        assert_eq!(writer.into_bytes(), words(&[status, 0, 1, number, status]));
    }
}

#[test]
fn an_answer_to_a_callback_says_what_became_of_its_slot() {
    let slot = CbSequenceResult {
        session_id: SEQUENCE.session_id,
        sequence_id: 1,
        slot_id: 0,
        highest_slot_id: 0,
        target_highest_slot_id: 0,
    };
    let mut writer = Writer::default();
    let mut reply = ReplyWriter::new(&mut writer, b"");
    reply.cb_sequence(&slot);
    let recall = Callback::RecallSlot {
        target_highest_slot_id: 3,
    };
    reply.cb_done(&recall);
    reply.finish();
    assert_eq!(callback_reply(writer.bytes()), Ok((Status::OK, Some(slot))));
    let mut writer = Writer::default();
    ReplyWriter::new(&mut writer, b"").cb_failed(&recall, Status::BADSESSION);
    assert_eq!(callback_reply(writer.bytes()), Ok((Status::BADSESSION, None)));
}

#[test]
fn attributes_that_nobody_here_knows_are_refused_in_values_and_kept_in_sets() {
    let bytes = words(&[1, 0x8000_0000, 0]);
    let error = XdrError::Value {
        field: "attrmask",
        value: 31 + 32,
    };
    let second_word = words(&[2, 0, 0x8000_0000, 0]);
    assert_eq!(
        <Attributes as crate::nfs::xdr::Xdr>::read(&mut Reader::new(&second_word)),
        Err(error)
    );
    let set = <Bitmap as crate::nfs::xdr::Xdr>::read(&mut Reader::new(&bytes)).unwrap();
    assert!(set.has(number::MAXWRITE) && !set.has(number::SIZE) && !set.has(500));
    assert_eq!(set, Bitmap::of(&[number::MAXWRITE, 128]));
}

#[test]
fn only_what_is_wanted_of_attributes_is_kept() {
    let attributes = Attributes {
        size: Some(1),
        mode: Some(2),
        ..Attributes::default()
    };
    let wanted = Bitmap::of(&[number::SIZE, number::CHANGE]);
    assert_eq!(attributes.set().intersection(wanted), Bitmap::of(&[number::SIZE]));
    assert_eq!(attributes.only(wanted).set(), Bitmap::of(&[number::SIZE]));
    assert!(Bitmap::EMPTY.is_empty());
}

#[test]
fn a_name_is_one_component() {
    for wrong in ["", ".", "..", "a/b", "a\0"] {
        assert_eq!(Name::new(wrong), None, "{wrong:?}");
    }
    assert_eq!(Name::new([b'a'; 256]), None);
    assert_eq!(Name::new("é\n").unwrap().to_string(), "\\xc3\\xa9\\n");
}

/// What a server may say when it grants a delegation all the same: a limit in blocks, and somebody in the entry.
#[test]
fn a_delegation_is_read_with_whatever_comes_with_it() {
    let bytes = [
        words(&[2, 1]),
        b"a delegation".to_vec(),
        words(&[1, 2, 5, 512, 0, 0, 0, 9]),
        b"EVERYONE@\0\0\0".to_vec(),
    ]
    .concat();
    let mut reader = Reader::new(&bytes);
    let stateid = Stateid {
        seqid: 1,
        other: *b"a delegation",
    };
    let delegation = Delegation::Write {
        stateid,
        recall: true,
    };
    assert_eq!(crate::nfs::xdr::Xdr::read(&mut reader), Ok(delegation));
    assert_eq!(reader.end(), Ok(()));
}
