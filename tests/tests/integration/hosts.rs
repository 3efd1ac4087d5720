//! Hosts are apart from each other and from this machine, and faults happen on the cables between them.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::harness::hosts::Star;
use coracle_tests::harness::iscsi::target::{Plan, Target, url};
use coracle_tests::harness::proxy::{Direction, Fault, Proxy};
use coracle_tests::{Outcome, ensure};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "clients_reach_the_server_through_a_proxy_and_nobody_else",
        need: Need::Hosts,
        run: clients_reach_the_server_through_a_proxy_and_nobody_else,
    },
    Case {
        name: "a_program_on_a_host_has_its_network",
        need: Need::Hosts,
        run: a_program_on_a_host_has_its_network,
    },
    Case {
        name: "a_target_on_a_host_serves_the_others_and_not_this_machine",
        need: Need::Hosts,
        run: a_target_on_a_host_serves_the_others_and_not_this_machine,
    },
];

const SOON: Duration = Duration::from_secs(10);

fn clients_reach_the_server_through_a_proxy_and_nobody_else(context: &Context) -> Outcome {
    let star = Star::new(2)?;
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let listener = star.server.inside(|| TcpListener::bind((loopback, 0)))??;
    let served = listener.local_addr()?;
    let everywhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let seed = context.seed.clone();
    let proxy = star.server.inside(|| Proxy::start(everywhere, served, seed))??;
    for (number, client) in (0..).zip(&star.clients) {
        let address = SocketAddr::new(Star::server_address(number), proxy.address().port());
        let mut near = client.inside(|| TcpStream::connect_timeout(&address, SOON))??;
        let (mut far, _) = listener.accept()?;
        near.set_read_timeout(Some(SOON))?;
        far.set_read_timeout(Some(SOON))?;
        near.write_all(b"to the server")?;
        far.read_exact(&mut [0; 13])?;
        proxy.set(Direction::ToClient, Fault::Corrupt { bytes: 1 })?;
        far.write_all(&[0; 3])?;
        let mut answer = [0; 3];
        near.read_exact(&mut answer)?;
        ensure!(answer == [0, 0xff, 0], "client {number} got {answer:?}");
        proxy.cut()?;
        ensure!(near.read(&mut [0]).is_err(), "client {number} saw no reset");
        // What serves behind the proxy is not reachable around it, nor from this machine.
        let around = SocketAddr::new(Star::server_address(number), served.port());
        let direct = client.inside(|| TcpStream::connect_timeout(&around, SOON))?;
        ensure!(
            direct.is_err(),
            "client {number} reached the server without the proxy"
        );
    }
    let here = TcpStream::connect_timeout(&served, SOON);
    ensure!(here.is_err(), "this machine reached a server of another host");
    Ok(())
}

fn a_program_on_a_host_has_its_network(_: &Context) -> Outcome {
    let star = Star::new(1)?;
    let client = star.clients.first().ok_or("there is one client")?;
    let program = || Command::new("cat").arg("/proc/self/net/dev").output();
    let there = String::from_utf8(client.inside(program)??.stdout)?;
    let here = String::from_utf8(program()?.stdout)?;
    ensure!(there.contains("to-server"), "a client's devices: {there}");
    ensure!(!here.contains("to-server"), "this machine's devices: {here}");
    Ok(())
}

fn a_target_on_a_host_serves_the_others_and_not_this_machine(_: &Context) -> Outcome {
    let star = Star::new(1)?;
    let target = Target::start_on(&star.server, Plan::disk(1 << 20))?;
    let client = star.clients.first().ok_or("there is one client")?;
    let capacity = |address: SocketAddr| {
        Command::new("timeout")
            .args(["20", "iscsi-readcapacity16", &url(address, 1)])
            .output()
    };
    let port = target.address().port();
    let there = client.inside(|| capacity(SocketAddr::new(star.server.address, port)))??;
    let said = String::from_utf8_lossy(&there.stdout).into_owned();
    ensure!(said.contains("Total size:1048576"), "a client sees: {said}");
    let here = capacity(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))?;
    ensure!(
        !here.status.success(),
        "this machine reached a target of another host"
    );
    Ok(())
}
