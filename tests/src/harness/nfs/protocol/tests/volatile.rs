//! What is not committed is gone after a crash, its verifier is another, and the session is the server's own all the time.

use super::client::verifier_of_write;
use super::*;

const BLOCK_BYTES: usize = 512;
const BLOCKS: usize = 64;

fn volatile(server: &Server) -> Proxy {
    let nfs = Nfs::over(&server.path("export"));
    Proxy::volatile(HERE, server.address(), Seed::from(1), nfs).expect("a free port")
}

/// What a power failure does to a server, and a client that comes back to it.
fn fail_power(server: &mut Server, proxy: &Proxy, client: &mut Client) -> usize {
    server.kill().expect("it lives");
    let forgotten = proxy.crash().expect("it runs");
    server.restart().expect("its port is its own");
    client.connect_again(proxy.address());
    client.make_session();
    assert_eq!(client.reclaim().status, OK, "{}", server.log());
    forgotten
}

#[test]
fn a_power_failure_takes_what_was_not_committed_and_nothing_else() {
    let mut server = server();
    let proxy = volatile(&server);
    let mut client = Client::begin(proxy.address(), "one");
    let before = client.write(0, &[1; 8192]);
    assert_eq!(client.commit(), before, "nothing was lost");
    for block in 0..5 {
        assert_eq!(client.write(block * 1000, &[2; 1000]), before);
    }
    assert_eq!(client.read(0, 8192)[..5000], [2; 5000], "what is written is read");
    let stable = client.write_operation(6000, &[3; 600], 2);
    assert_eq!(client.on_file(&stable).status, OK);
    assert_eq!(fail_power(&mut server, &proxy, &mut client), 5);
    let mut expected = vec![1; 8192];
    expected[6000..6600].fill(3);
    assert_eq!(image(&server)[..8192], expected);
    assert_eq!(client.read(0, 8192), expected);
    let after = client.write(0, &[4; 512]);
    assert_ne!(after, before);
    assert_eq!(client.commit(), after);
    assert_eq!(fail_power(&mut server, &proxy, &mut client), 0);
    assert_eq!(client.read(0, 512), [4; 512]);
}

#[test]
fn a_commit_that_comes_before_the_answer_to_its_write_makes_nothing_safe() {
    let server = server();
    let proxy = volatile(&server);
    let mut client = Client::begin(proxy.address(), "one");
    let write = client.write_operation(0, &[1; 512], 0);
    client.send_two([&write, &commit_operation()]);
    for _ in 0..2 {
        client.receive().expect("an answer");
    }
    assert_eq!(image(&server)[..512], [1; 512]);
    assert_eq!(proxy.crash().expect("it runs"), 1);
    assert_eq!(image(&server)[..512], [0; 512]);
}

#[test]
fn a_write_and_a_commit_in_one_call_are_safe() {
    let mut server = server();
    let proxy = volatile(&server);
    let mut client = Client::begin(proxy.address(), "one");
    let both = [client.write_operation(0, &[9; 512], 0), commit_operation()].concat();
    let operations = [client.put_handle(), both].concat();
    assert_eq!(client.call(&operations, 3).status, OK);
    assert_eq!(fail_power(&mut server, &proxy, &mut client), 0);
    assert_eq!(client.read(0, 512), [9; 512]);
}

#[test]
fn a_crash_alone_keeps_the_session_and_answers_what_is_sent_again_as_it_did_before() {
    let server = server();
    let proxy = volatile(&server);
    let mut client = Client::begin(proxy.address(), "one");
    let write = client.write_operation(0, &[7; 512], 0);
    let first = verifier_of_write(&client.on_file(&write), 512);
    assert_eq!(proxy.crash().expect("it runs"), 1);
    assert!(client.receive().is_err(), "the connection is gone");
    assert_eq!(image(&server)[..512], [0; 512]);
    client.connect_again(proxy.address());
    let again = [client.put_handle(), write].concat();
    client.send_again(&again, 2);
    // The server has done it once, and does not do it again.
    assert_eq!(verifier_of_write(&client.finish_on_file(), 512), first);
    assert_eq!(client.read(0, 512), [0; 512]);
    let now = client.commit();
    assert_ne!(now, first, "so the client knows that it must write it again");
    assert_eq!(client.write(0, &[7; 512]), now);
    assert_eq!(client.commit(), now);
    assert_eq!(proxy.crash().expect("it runs"), 0);
    assert_eq!(image(&server)[..512], [7; 512]);
}

#[test]
fn a_write_that_comes_twice_is_answered_twice_alike() {
    let server = server();
    let proxy = volatile(&server);
    let mut client = Client::begin(proxy.address(), "one");
    proxy.crash().expect("it runs");
    client.connect_again(proxy.address());
    client.write(0, &[1; 512]);
    lay(&proxy, Direction::ToServer, Step::Write, Then::Twice);
    client.send_on_file(&client.write_operation(0, &[2; 512], 0));
    let [first, second] = [0; 2].map(|_| client.receive().expect("an answer"));
    assert_eq!(first, second);
    assert_eq!(proxy.crash().expect("it runs"), 2);
}

#[test]
fn a_write_that_an_old_connection_delivers_late_is_the_servers_to_refuse() {
    let server = server();
    let proxy = volatile(&server);
    let mut client = Client::begin(proxy.address(), "one");
    let write = client.write_operation(0, &[1; 512], 0);
    proxy.set(Direction::ToServer, Fault::BlackHole).expect("it runs");
    client.send_on_file(&write);
    while proxy.held_bytes(Direction::ToServer).expect("it runs") < 512 {
        std::thread::sleep(Duration::from_millis(1));
    }
    proxy.strand().expect("it runs");
    proxy.set(Direction::ToServer, Fault::None).expect("it runs");
    client.connect_again(proxy.address());
    let again = [client.put_handle(), write].concat();
    client.send_again(&again, 2);
    let verifier = verifier_of_write(&client.finish_on_file(), 512);
    assert_eq!(client.write(0, &[2; 512]), verifier);
    assert_eq!(client.commit(), verifier);
    assert!(proxy.deliver_late().expect("it runs") > 512);
    // The server has judged it when it is answered.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(client.read(0, 512), [2; 512]);
    // Unless the server found the end of the connection first: then nobody knows, and it is found not to be there.
    assert!(proxy.crash().expect("it runs") <= 1);
    assert_eq!(image(&server)[..512], [2; 512]);
}

#[test]
fn a_write_that_the_server_refuses_is_refused_and_is_not_taken_back() {
    let server = server();
    let proxy = volatile(&server);
    let mut client = Client::begin(proxy.address(), "one");
    client.write(0, &[1; 512]);
    client.commit();
    let mut refused = client.write_operation(0, &[1; 512], 0);
    // Another stateid.
    refused[8..20].fill(0x77);
    assert_ne!(client.on_file(&refused).status, OK);
    assert_eq!(proxy.crash().expect("it runs"), 0);
    assert_eq!(image(&server)[..512], [1; 512]);
}

#[test]
fn what_somebody_else_has_written_over_it_is_not_taken_back() {
    use std::os::unix::fs::FileExt;
    let server = server();
    let proxy = volatile(&server);
    let mut client = Client::begin(proxy.address(), "one");
    client.write(0, &[1; 2048]);
    let other = std::fs::File::options().write(true).open(server.path(IMAGE));
    other
        .and_then(|file| file.write_all_at(&[2; 512], 512))
        .expect("it is there");
    assert_eq!(proxy.crash().expect("it runs"), 1);
    let found = image(&server);
    assert_eq!(found[..512], [0; 512]);
    assert_eq!(found[512..1024], [2; 512]);
    assert_eq!(found[1024..2048], [0; 1024]);
}

/// Random writes, reads, commits and crashes: a read sees the newest, a commit makes it safe, a crash takes the rest.
#[test]
fn reads_commits_and_crashes_agree_with_a_model_of_the_image() {
    let server = server();
    for number in 1..=4 {
        let mut seed = Seed::from(number);
        let proxy = volatile(&server);
        let mut client = Client::begin(proxy.address(), "one");
        let length = BLOCKS * BLOCK_BYTES;
        let mut newest = image(&server)[..length].to_vec();
        let mut safe = newest.clone();
        for step in 0..200 {
            let first = usize::try_from(seed.below(BLOCKS as u64)).expect("small");
            let count = usize::try_from(1 + seed.below(8)).expect("small");
            let range = first * BLOCK_BYTES..(first + count).min(BLOCKS) * BLOCK_BYTES;
            let offset = u64::try_from(range.start).expect("small");
            match seed.below(20) {
                0 => {
                    client.commit();
                    safe.clone_from(&newest);
                }
                1 => {
                    proxy.crash().expect("it runs");
                    assert!(image(&server)[..length] == safe, "seed {number} step {step}");
                    newest.clone_from(&safe);
                    client.connect_again(proxy.address());
                }
                2..=8 => {
                    let count = u32::try_from(range.len()).expect("small");
                    assert!(
                        client.read(offset, count) == newest[range],
                        "seed {number} step {step}"
                    );
                }
                _ => {
                    let fill = u8::try_from(seed.below(256)).expect("a byte");
                    newest[range.clone()].fill(fill);
                    client.write(offset, &vec![fill; range.len()]);
                }
            }
        }
    }
}
