//! The rules of RFC 7143: how logins, windows, aborts and pings go, and what breaks them.

use coracle_storage::iscsi::pdu::{
    DataOut, InitiatorPdu, Lun, RejectReason, ScsiCommand, Serial, Tag, TaskAttribute, TaskFunction,
    TaskOutcome,
};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::target::options::{Hostility, Limits, Mishaps, Options, Pace};
use coracle_storage::sim::target::{Redirect, Target, Term};

use super::client::{Client, Transfer};
use super::{pattern, target, with_seed, write_cdb};

fn slow() -> Options {
    Options {
        pace: Pace::Dice,
        ..Options::default()
    }
}

#[test]
fn a_login_comes_to_the_least_that_both_can_take() {
    let target = target(Options::default());
    let offers = "InitialR2T=No\0ImmediateData=Yes\0MaxBurstLength=16776192\0FirstBurstLength=4096\0\
                  MaxOutstandingR2T=8\0MaxConnections=4\0ErrorRecoveryLevel=2\0HeaderDigest=CRC32C,None\0\
                  DataDigest=None\0X-com.example=1\0";
    let client = Client::log_in(&target, "iqn.x:a", 1, offers).unwrap();
    for (key, value) in [
        ("InitialR2T", "Yes"),
        ("ImmediateData", "Yes"),
        ("MaxBurstLength", "262144"),
        ("FirstBurstLength", "4096"),
        ("MaxOutstandingR2T", "1"),
        ("MaxConnections", "1"),
        ("ErrorRecoveryLevel", "0"),
        ("HeaderDigest", "CRC32C"),
        ("DataDigest", "None"),
        ("MaxRecvDataSegmentLength", "8192"),
        ("TargetPortalGroupTag", "1"),
        ("X-com.example", "NotUnderstood"),
    ] {
        assert_eq!(client.key(key), Some(value), "{key}");
    }
}

#[test]
fn a_login_that_cannot_be_is_refused_with_the_reason() {
    let target = target(Options::default());
    let refused = |keys: &str| Client::log_in(&target, "iqn.x:a", 1, keys).err().unwrap();
    let (class, detail, _) = refused("TargetName=iqn.2026-01.test:other\0");
    assert_eq!((class, detail), (2, 3));
    let (class, detail, _) = refused("AuthMethod=CHAP\0");
    assert_eq!((class, detail), (2, 1));
    assert!(target.sessions().is_empty());
}

#[test]
fn a_redirect_names_the_other_address_and_ends() {
    let target = target(Options::default());
    let redirect = |term| {
        target.redirect(Some(Redirect {
            address: "192.0.2.7:3260".to_owned(),
            term,
        }));
        Client::log_in(&target, "iqn.x:a", 1, "").err().unwrap()
    };
    let address = "TargetAddress=192.0.2.7:3260\0".to_owned();
    assert_eq!(redirect(Term::Temporarily), (1, 1, address.clone()));
    assert_eq!(redirect(Term::Permanently), (1, 2, address));
    target.redirect(None);
    assert!(Client::log_in(&target, "iqn.x:a", 1, "").is_ok());
}

#[test]
fn discovery_tells_where_the_target_is() {
    let target = target(Options::default());
    let mut client = Client::log_in(&target, "iqn.x:a", 1, "SessionType=Discovery\0").unwrap();
    assert_eq!(
        client.ask("SendTargets=All\0"),
        "TargetName=iqn.2026-01.test:t1\0TargetAddress=127.0.0.1:3260,1\0"
    );
}

#[test]
fn a_ping_comes_back_and_the_target_pings_too() {
    let mishaps = Mishaps {
        ping_one_in: 2,
        ..Mishaps::default()
    };
    let target = target(Options { mishaps, ..slow() });
    let mut client = Client::ready(&target, "iqn.x:a", 1);
    assert_eq!(client.ping(b"are you there"), b"are you there");
    for _ in 0..50 {
        client.go_on();
    }
    assert!(client.pings > 5);
    assert_eq!(target.complaints(), [""; 0]);
}

#[test]
fn small_bursts_are_asked_for_in_order_and_several_at_a_time() {
    let limits = Limits {
        max_outstanding_r2t: 4,
        ..Limits::default()
    };
    let mut asked = 0;
    for seed in 0..20 {
        let target = with_seed(Options { limits, ..slow() }, seed);
        let mut client = Client::log_in(&target, "iqn.x:a", 1, "MaxOutstandingR2T=4\0").unwrap();
        while client.run(1, &[0], Transfer::Nothing).status != 0 {}
        let bytes = pattern(1, 100 * 512);
        assert_eq!(client.write(5, &bytes).status, 0);
        assert_eq!(target.content(1)[5 * 512..][..bytes.len()], bytes);
        asked = asked.max(client.r2ts);
    }
    assert!(asked > 10, "never more than {asked} R2Ts for one write");
}

#[test]
fn an_aborted_command_is_not_answered_and_does_nothing_later() {
    let mut aborted = 0;
    for seed in 0..50 {
        let target = with_seed(slow(), seed);
        let mut client = Client::ready(&target, "iqn.x:a", 1);
        let bytes = pattern(9, 512);
        let tag = client.start(1, &write_cdb(0, &bytes), &Transfer::Out(&bytes));
        let outcome = client.manage(TaskFunction::ABORT_TASK, 1, tag);
        let content = target.content(1);
        for _ in 0..50 {
            client.go_on();
        }
        assert_eq!(target.content(1), content);
        if outcome == TaskOutcome::FUNCTION_COMPLETE && !client.has_ended(tag) {
            aborted += 1;
        } else {
            assert!(client.has_ended(tag), "{outcome:?}");
        }
    }
    assert!(aborted > 5, "only {aborted} were aborted");
}

#[test]
fn task_management_says_what_there_is_not() {
    let target = target(Options::default());
    let mut client = Client::ready(&target, "iqn.x:a", 1);
    let mut manage = |function, lun| client.manage(function, lun, 77);
    assert_eq!(
        manage(TaskFunction::ABORT_TASK, 1),
        TaskOutcome::TASK_DOES_NOT_EXIST
    );
    assert_eq!(
        manage(TaskFunction::LOGICAL_UNIT_RESET, 5),
        TaskOutcome::LUN_DOES_NOT_EXIST
    );
    assert_eq!(
        manage(TaskFunction::CLEAR_ACA, 1),
        TaskOutcome::FUNCTION_NOT_SUPPORTED
    );
    assert_eq!(
        manage(TaskFunction::TASK_REASSIGN, 1),
        TaskOutcome::REASSIGNMENT_NOT_SUPPORTED
    );
}

#[test]
fn a_logout_is_answered_and_ends_the_connection() {
    let target = target(slow());
    let mut client = Client::ready(&target, "iqn.x:a", 1);
    assert_eq!(client.log_out(), 0);
    while client.connection.is_busy() {
        client.go_on();
    }
    assert!(client.connection.closed());
    assert!(target.sessions().is_empty());
}

#[test]
fn a_target_asks_for_logouts_drops_sessions_and_rejects_commands() {
    let mishaps = |logout_request_one_in, session_drop_one_in, reject_one_in| Options {
        mishaps: Mishaps {
            logout_request_one_in,
            session_drop_one_in,
            reject_one_in,
            ..Mishaps::default()
        },
        ..slow()
    };
    let connected = |options| {
        let target = target(Options::default());
        let client = Client::ready(&target, "iqn.x:a", 1);
        target.adjust(|present| *present = options);
        (target, client)
    };
    let (_target, mut client) = connected(mishaps(1, 0, 0));
    for _ in 0..10 {
        client.go_on();
    }
    assert_eq!(client.asyncs, [1]);
    client.start(1, &[0], &Transfer::Nothing);
    for _ in 0..20 {
        client.go_on();
    }
    assert_eq!(client.rejects[0].0, RejectReason::WAITING_FOR_LOGOUT);
    let (_target, mut client) = connected(mishaps(0, 1, 0));
    for _ in 0..20 {
        client.go_on();
    }
    assert_eq!(
        (client.asyncs.as_slice(), client.connection.closed()),
        ([3].as_slice(), true)
    );
    let (_target, mut client) = connected(mishaps(0, 0, 1));
    let tag = client.start(1, &[0], &Transfer::Nothing);
    for _ in 0..20 {
        client.go_on();
    }
    assert_eq!(client.rejects, [(RejectReason::OUT_OF_RESOURCES, tag)]);
}

#[test]
fn a_closed_window_opens_again_without_a_command() {
    let target = target(Options {
        limits: Limits {
            commands_max: 1,
            ..Limits::default()
        },
        mishaps: Mishaps {
            closed_window_one_in: 2,
            ..Mishaps::default()
        },
        ..slow()
    });
    let mut client = Client::ready(&target, "iqn.x:a", 1);
    let mut was_closed = false;
    for _ in 0..50 {
        client.run(1, &[0], Transfer::Nothing);
        was_closed |= !client.may_start();
    }
    assert!(was_closed);
    assert_eq!(target.complaints(), [""; 0]);
}

fn command(tag: u32, cmd_sn: u32, expected: u32) -> InitiatorPdu {
    InitiatorPdu::ScsiCommand(ScsiCommand {
        immediate: false,
        is_final: true,
        read: false,
        write: expected > 0,
        attribute: TaskAttribute::Simple,
        lun: Lun::new(1).unwrap(),
        initiator_task_tag: Tag(tag),
        expected_data_transfer_length: expected,
        cmd_sn: Serial(cmd_sn),
        exp_stat_sn: Serial(0),
        cdb: write_cdb(0, &[0; 512]),
    })
}

fn data_out(tag: u32, transfer: u32, offset: u32) -> InitiatorPdu {
    InitiatorPdu::DataOut(DataOut {
        is_final: true,
        lun: Lun::new(1).unwrap(),
        initiator_task_tag: Tag(tag),
        target_transfer_tag: Tag(transfer),
        exp_stat_sn: Serial(0),
        data_sn: 0,
        buffer_offset: offset,
    })
}

/// A word of the complaint, and what it is about.
type Break<'a> = (&'a str, &'a dyn Fn(&mut Client));

#[test]
fn an_initiator_that_breaks_the_rules_is_found_out() {
    let broken = |act: &dyn Fn(&mut Client)| {
        let target = target(Options::default());
        let mut client = Client::log_in(&target, "iqn.x:a", 1, "").unwrap();
        act(&mut client);
        // The numbers are not the client's own.
        client.connection.transmit();
        let complaints = target.complaints();
        assert_eq!(complaints.len(), 1, "{complaints:?}");
        complaints[0].clone()
    };
    let cases: [Break<'_>; 7] = [
        ("CmdSN", &|client| client.send(command(1, 99, 0), &[])),
        ("expects to transfer", &|client| {
            client.send(command(1, 7, 512), &[0; 1024])
        }),
        ("in use", &|client| {
            client.send(command(1, 7, 512), &[]);
            client.send(command(1, 8, 512), &[]);
        }),
        ("wants none", &|client| client.send(data_out(1, 5, 0), &[0; 512])),
        ("where 0 was due", &|client| {
            client.send(command(1, 7, 1024), &[]);
            client.send(data_out(1, 0, 512), &[0; 512]);
        }),
        ("does not write", &|client| client.send(command(1, 7, 0), &[0; 4])),
        ("longer than", &|client| {
            client.send(command(1, 7, 65536), &[0; 20000])
        }),
    ];
    for (words, act) in cases {
        let complaint = broken(act);
        let is_found =
            complaint.contains(words) || (words == "without" && complaint.contains("does not write"));
        assert!(is_found, "{words}: {complaint}");
    }
}

#[test]
fn a_wrong_digest_ends_the_connection() {
    let target = target(Options::default());
    let mut client = Client::log_in(&target, "iqn.x:a", 1, "HeaderDigest=CRC32C\0").unwrap();
    client.connection.receive(&[0; 52]);
    while client.connection.is_busy() {
        client.go_on();
    }
    assert!(client.connection.closed());
    assert_eq!(target.complaints(), ["the digest of a header is wrong"]);
}

#[test]
fn a_seed_makes_the_same_target_again() {
    let bytes = |seed| {
        let target = with_seed(Options::draw(&mut Dice::new(seed)), seed);
        exchange(&target)
    };
    assert_eq!(bytes(3), bytes(3));
    assert_ne!(bytes(3), bytes(4));
}

/// All bytes that a target sends for a fixed conversation.
fn exchange(target: &Target) -> Vec<u8> {
    let mut client = Client::log_in(target, "iqn.x:a", 1, "").unwrap();
    client.send(command(1, 7, 0), &[]);
    let mut bytes = Vec::new();
    for _ in 0..200 {
        bytes.extend(client.connection.transmit());
    }
    bytes
}

#[test]
fn each_hostility_shows_in_what_is_sent_and_none_breaks_the_target() {
    let kinds: [fn(&mut Hostility); 11] = [
        |hostility| hostility.duplicated_one_in = 1,
        |hostility| hostility.reordered_one_in = 2,
        |hostility| hostility.wrong_tag_one_in = 1,
        |hostility| hostility.wrong_stat_sn_one_in = 1,
        |hostility| hostility.stray_data_one_in = 1,
        |hostility| hostility.resized_data_one_in = 1,
        |hostility| hostility.r2t_beyond_one_in = 1,
        |hostility| hostility.garbage_one_in = 1,
        |hostility| hostility.wrong_digest_one_in = 1,
        |hostility| hostility.noise_one_in = 1,
        |hostility| hostility.login_response_one_in = 1,
    ];
    let conversation = |hostility| {
        let target = target(Options::default());
        let mut client = Client::ready(&target, "iqn.x:a", 1);
        target.adjust(|options| options.hostility = hostility);
        let mut write = write_cdb(0, &[0; 20 * 512]);
        client.start(1, &write, &Transfer::Out(&[5; 20 * 512]));
        write[0] = 0x88;
        client.start(1, &write, &Transfer::In(20 * 512));
        client.start(1, &write, &Transfer::In(20 * 512));
        let mut bytes = Vec::new();
        for _ in 0..5 {
            bytes.extend(client.connection.transmit());
        }
        bytes
    };
    let polite = conversation(Hostility::default());
    for (number, set) in kinds.into_iter().enumerate() {
        let mut hostility = Hostility::default();
        set(&mut hostility);
        assert_ne!(conversation(hostility), polite, "hostility {number}");
    }
}

#[test]
fn no_bytes_break_the_target() {
    for seed in 0..2000 {
        let mut dice = Dice::new(seed);
        let target = with_seed(Options::draw(&mut dice), seed);
        let mut client = Client::log_in(&target, "iqn.x:a", 1, "").unwrap();
        let mut pdu = [
            command(1, 7, 1024).bhs(),
            data_out(1, 0, 0).bhs(),
            command(2, 8, 0).bhs(),
        ];
        for bhs in &mut pdu {
            for _ in 0..dice.index(4) {
                let (at, bits) = (dice.index(48), dice.below(256));
                bhs.0[at] ^= u8::try_from(bits).unwrap();
            }
            let data_bytes = usize::try_from(bhs.data_segment_bytes().min(2000)).unwrap();
            client.connection.receive(&bhs.0);
            client
                .connection
                .receive(&vec![0x5a; data_bytes.next_multiple_of(4)]);
            client.connection.transmit();
        }
        client.connection.close();
        for _ in 0..20 {
            target.advance();
        }
    }
}
