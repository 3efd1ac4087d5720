//! What a logical unit keeps, loses, and says of itself.

use std::collections::BTreeSet;

use coracle_storage::backend::Access;
use coracle_storage::iscsi::pdu::{Residual, TaskAttribute};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::target::options::{Mishaps, Options, Pace, Quirks};

use super::client::{Client, Transfer};
use super::{SIZE_BYTES, cdb16, pattern, target, with_seed, write_cdb};

#[test]
fn whatever_the_dice_say_what_was_written_is_read() {
    for seed in 0..60 {
        let mut dice = Dice::new(seed);
        let mut options = Options::draw(&mut dice);
        options.mishaps.logout_request_one_in = 0;
        options.mishaps.session_drop_one_in = 0;
        options.mishaps.reject_one_in = 0;
        let target = with_seed(options, seed);
        let mut client = Client::log_in(&target, "iqn.x:a", 1, OFFERS[dice.index(OFFERS.len())]).unwrap();
        let mut model = vec![0; usize::try_from(SIZE_BYTES).unwrap()];
        for round in 0..12 {
            let count = 1 + dice.index(200);
            let at = dice.index(model.len() / 512 - count);
            let bytes = pattern(round, count * 512);
            model[at * 512..][..bytes.len()].copy_from_slice(&bytes);
            again(|| client.write(at as u64, &bytes).status);
            let mut found = Vec::new();
            let (first, count) = (dice.index(1000), 1 + dice.index(500));
            again(|| {
                let outcome = client.read(first as u64, u32::try_from(count).unwrap());
                found = outcome.data;
                outcome.status
            });
            assert_eq!(found, model[first * 512..][..count * 512], "seed {seed}");
        }
        assert_eq!(target.content(1), model, "seed {seed}");
        assert_eq!(target.complaints(), [""; 0], "seed {seed}");
    }
}

/// Sends a command until it is carried out.
fn again(mut send: impl FnMut() -> u8) {
    let mut tries = 0;
    while send() != 0 {
        tries += 1;
        assert!(tries < 100, "a command is refused for ever");
    }
}

const OFFERS: &[&str] = &[
    "",
    "HeaderDigest=CRC32C,None\0DataDigest=CRC32C,None\0",
    "InitialR2T=No\0ImmediateData=Yes\0FirstBurstLength=262144\0MaxBurstLength=1048576\0MaxOutstandingR2T=8\0",
    "ImmediateData=No\0MaxBurstLength=512\0FirstBurstLength=512\0DataDigest=CRC32C\0",
];

#[test]
fn commands_end_in_any_order_and_none_is_lost() {
    let mut orders = BTreeSet::new();
    for seed in 0..40 {
        let options = Options {
            pace: Pace::Dice,
            ..Options::default()
        };
        let target = with_seed(options, seed);
        let mut client = Client::ready(&target, "iqn.x:a", 1);
        let started: Vec<u32> = (0..4)
            .map(|number| {
                let bytes = pattern(number, 1024);
                client.start(
                    1,
                    &write_cdb(u64::from(number) * 2, &bytes),
                    &Transfer::Out(&bytes),
                )
            })
            .collect();
        let mut order = Vec::new();
        while order.len() < started.len() {
            client.go_on();
            for tag in &started {
                if client.has_ended(*tag) && !order.contains(tag) {
                    order.push(*tag);
                }
            }
        }
        orders.insert(order);
    }
    assert!(orders.len() > 5, "only {orders:?}");
}

#[test]
fn an_ordered_command_is_not_overtaken_either_way() {
    for seed in 0..40 {
        let options = Options {
            pace: Pace::Dice,
            ..Options::default()
        };
        let target = with_seed(options, seed);
        let mut client = Client::ready(&target, "iqn.x:a", 1);
        for (byte, attribute) in [
            (1, TaskAttribute::Simple),
            (2, TaskAttribute::Ordered),
            (3, TaskAttribute::Simple),
        ] {
            client.attribute = attribute;
            client.start(1, &write_cdb(0, &[0; 512]), &Transfer::Out(&[byte; 512]));
        }
        let mut seen = vec![0];
        while seen.last() != Some(&3) {
            client.go_on();
            let now = target.content(1)[0];
            if seen.last() != Some(&now) {
                seen.push(now);
            }
        }
        assert!(seen.is_sorted(), "seed {seed}: {seen:?}");
    }
}

#[test]
fn a_crash_keeps_what_was_synchronized_or_forced_and_anything_of_the_rest() {
    let mut left = BTreeSet::new();
    for seed in 0..80 {
        let target = with_seed(Options::default(), seed);
        let mut client = Client::ready(&target, "iqn.x:a", 1);
        client.write(0, &[1; 512]);
        assert_eq!(client.synchronize().status, 0);
        client.write(0, &[2; 512]);
        client.run(1, &cdb16(0x8a, 8, 1, 1), Transfer::Out(&[3; 512]));
        client.write(2, &[4; 512]);
        assert_eq!([target.content(1)[0], target.durable(1)[0]], [2, 1]);
        assert_eq!([target.durable(1)[512], target.durable(1)[1024]], [3, 0]);
        target.crash();
        assert!(client.connection.closed() && client.connection.transmit().is_empty());
        let content = target.content(1);
        assert_eq!(content[512..1024], [3; 512]);
        left.insert((content[0], content[1024]));
    }
    assert_eq!(left, BTreeSet::from([(1, 0), (1, 4), (2, 0), (2, 4)]));
}

#[test]
fn a_restart_loses_sessions_and_no_bytes() {
    let target = target(Options::default());
    let mut client = Client::ready(&target, "iqn.x:a", 1);
    client.write(0, &[2; 512]);
    target.restart();
    assert!(client.connection.closed());
    assert_eq!(target.content(1)[..512], [2; 512]);
    assert_eq!(Client::ready(&target, "iqn.x:a", 1).read(0, 1).data, [2; 512]);
}

#[test]
fn unmapped_and_same_blocks_read_as_they_must() {
    let target = target(Options::default());
    let mut client = Client::ready(&target, "iqn.x:a", 1);
    client.write(0, &[7; 8 * 512]);
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend(2_u64.to_be_bytes());
    list.extend(3_u32.to_be_bytes());
    list.extend([0; 4]);
    let unmap = client.run(1, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], Transfer::Out(&list));
    assert_eq!(unmap.status, 0);
    let same = client.run(1, &cdb16(0x93, 0, 6, 2), Transfer::Out(&[9; 512]));
    assert_eq!(same.status, 0);
    let bytes = client.read(0, 8).data;
    let firsts: Vec<u8> = bytes.chunks(512).map(|block| block[0]).collect();
    assert_eq!(firsts, [7, 7, 0, 0, 0, 7, 9, 9]);
}

#[test]
fn compare_and_write_is_advertised_and_missing_or_works() {
    let mut data = vec![0; 512];
    data.extend([5; 512]);
    let mut cdb = cdb16(0x89, 0, 3, 0);
    cdb[13] = 1;
    let as_tgtd = target(Options::default());
    let mut client = Client::ready(&as_tgtd, "iqn.x:a", 1);
    assert_eq!(
        client.run(1, &[0x12, 1, 0xb0, 0, 255, 0], Transfer::In(255)).data[5],
        128
    );
    assert_eq!(client.run(1, &cdb, Transfer::Out(&data)).sense, (5, 0x2000));
    let whole = target(Options {
        quirks: Quirks::none(),
        ..Options::default()
    });
    let mut client = Client::ready(&whole, "iqn.x:a", 1);
    assert_eq!(client.run(1, &cdb, Transfer::Out(&data)).status, 0);
    assert_eq!(client.run(1, &cdb, Transfer::Out(&data)).sense, (0xe, 0x1d00));
    assert_eq!(client.read(3, 1).data, [5; 512]);
}

#[test]
fn what_does_not_exist_or_is_protected_is_refused() {
    let target = target(Options::default());
    target.add(2, 4096, Access::ReadOnly);
    let mut client = Client::ready(&target, "iqn.x:a", 1);
    assert_eq!(client.read(SIZE_BYTES / 512, 1).sense, (5, 0x2100));
    assert_eq!(client.read(u64::MAX, 2).sense, (5, 0x2100));
    assert_eq!(client.run(1, &[0xee], Transfer::Nothing).sense, (5, 0x2000));
    assert_eq!(client.run(9, &[0], Transfer::Nothing).sense, (5, 0x2500));
    assert_eq!(
        client.run(9, &[0x12, 0, 0, 0, 36, 0], Transfer::In(36)).data[0],
        0x7f
    );
    assert_eq!(client.run(2, &[0], Transfer::Nothing).sense, (6, 0x2900));
    let write = client.run(2, &write_cdb(0, &[0; 512]), Transfer::Out(&[0; 512]));
    assert_eq!(write.sense, (7, 0x2700));
    let mode = client.run(2, &[0x1a, 0, 0x3f, 0, 255, 0], Transfer::In(255));
    assert_eq!(mode.data[2] & 0x80, 0x80);
}

#[test]
fn a_unit_tells_its_shape_and_its_growth() {
    let target = target(Options::default());
    let mut client = Client::ready(&target, "iqn.x:a", 1);
    let capacity = |client: &mut Client| client.run(1, &cdb16(0x9e, 0x10, 0, 32), Transfer::In(32));
    let before = capacity(&mut client);
    assert_eq!(before.data[..8], (SIZE_BYTES / 512 - 1).to_be_bytes());
    assert_eq!(before.data[8..12], 512_u32.to_be_bytes());
    let luns = client.run(
        0,
        &[0xa0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0],
        Transfer::In(65535),
    );
    assert_eq!(luns.data[..8], [0, 0, 0, 16, 0, 0, 0, 0]);
    assert_eq!((luns.data[9], luns.data[17]), (0, 1));
    assert_eq!(luns.residual, Residual::Underflow(65535 - 24));
    target.grow(1, 2 * SIZE_BYTES);
    assert_eq!(client.read(0, 1).sense, (6, 0x2a09));
    assert_eq!(
        capacity(&mut client).data[..8],
        (2 * SIZE_BYTES / 512 - 1).to_be_bytes()
    );
}

#[test]
fn busy_and_full_task_sets_and_attentions_happen_and_change_nothing() {
    let mishaps = Mishaps {
        busy_one_in: 4,
        task_set_full_one_in: 4,
        attention_one_in: 4,
        ..Mishaps::default()
    };
    let target = target(Options {
        mishaps,
        ..Options::default()
    });
    let mut client = Client::log_in(&target, "iqn.x:a", 1, "").unwrap();
    let mut ends = BTreeSet::new();
    for round in 0..200 {
        let before = target.content(1);
        let end = client.write(0, &[round; 512]);
        if end.status != 0 {
            assert_eq!(target.content(1), before);
        }
        ends.insert((end.status, end.sense.1));
    }
    let all = [(0, 0), (2, 0x2900), (2, 0x2a01), (8, 0), (0x28, 0)];
    assert_eq!(ends, BTreeSet::from(all));
}
