//! From a URL to an image that can be used.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::nfs::error::NfsError;
use crate::nfs::v3::PORTMAP_PORT;
use crate::reactor::Submit;
use crate::remote::dialogue::{self, Dialogue};

use super::bringup::find;
use super::client::Client;
use super::disk::Disk;
use super::locate::{Ports, mount, ports};
use super::plan::Plan;

/// How long opening an image may take.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// Finds the file of `plan` on the first of the server's addresses that answers.
pub(in crate::nfs) fn open(plan: Plan) -> Result<Disk, NfsError> {
    let deadline = Instant::now() + OPEN_LIMIT;
    let plan = Arc::new(plan);
    let mut last = None;
    for server in plan.servers.clone() {
        match open_at(server, &plan, deadline) {
            Err(error @ (NfsError::Server { .. } | NfsError::NoPortmapper { .. })) => last = Some(error),
            opened => return opened,
        }
    }
    Err(last.expect("a name that was resolved has an address"))
}

fn open_at(server: SocketAddr, plan: &Arc<Plan>, deadline: Instant) -> Result<Disk, NfsError> {
    let at = |port| {
        let mut there = server;
        there.set_port(port);
        there
    };
    let converse = |server| {
        let io = dialogue::plain();
        let client = Client::new(server, Arc::clone(&plan.credential), io.now());
        let left = deadline.saturating_duration_since(Instant::now());
        Dialogue::new(io, client, vec![server], left)
    };
    let ports = match Ports::said(plan) {
        Some(said) => said,
        None => converse(at(PORTMAP_PORT))?
            .run(|port| ports(port, Arc::clone(plan)))
            .map_err(without_portmapper)?,
    };
    let mounted = converse(at(ports.mount))?.run(|port| mount(port, Arc::clone(plan)))?;
    let mut dialogue = converse(at(ports.nfs))?;
    let file = dialogue.run(|port| find(port, Arc::clone(plan), mounted))?;
    dialogue.into_disk(|client| Disk::new(Arc::clone(plan), at(ports.nfs), file, client))
}

fn without_portmapper(error: NfsError) -> NfsError {
    match error {
        NfsError::Server { server, source } => NfsError::NoPortmapper { server, source },
        error => error,
    }
}
