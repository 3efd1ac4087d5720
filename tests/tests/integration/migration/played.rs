//! A target that a test plays: it says what keeps a source going, and for the rest what the test wants.

use std::net::TcpListener;

use coracle_tests::Outcome;
use coracle_vmm::migration::hello::Answer;
use coracle_vmm::migration::join::Token;
use coracle_vmm::migration::stream::Stream;
use coracle_vmm::migration::tls::Identity;
use coracle_vmm::migration::wire::{Kind, Wire};

use super::Hosts;

pub(super) struct PlayedTarget {
    listener: TcpListener,
    identity: Identity,
    ready: Vec<u8>,
}

impl PlayedTarget {
    /// One of `hosts`, which says of itself whether it could fetch memory later.
    pub(super) fn new(hosts: &Hosts, postcopy: bool) -> Outcome<Self> {
        let answer = Answer {
            token: Token::random()?,
            postcopy,
        };
        Ok(Self {
            listener: TcpListener::bind("127.0.0.1:0")?,
            identity: Identity::read(&hosts.files()?)?,
            ready: postcard::to_stdvec(&answer)?,
        })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Outcome<String> {
        Ok(self.listener.local_addr()?.to_string())
    }

    /// The source that calls.
    pub(super) fn accept(&self) -> Outcome<Wire<Stream>> {
        let (socket, _) = self.listener.accept()?;
        Ok(Wire::new(Stream::from(self.identity.accept(socket, None)?)))
    }

    /// Answers a message of `kind`, if a source waits for that.
    pub(super) fn answer(&self, source: &mut Wire<Stream>, kind: Kind) -> Outcome {
        match kind {
            Kind::Hello => source.send(Kind::Ready, &[&self.ready])?,
            Kind::Mark => source.send(Kind::Reached, &[])?,
            _ => return Ok(()),
        }
        Ok(source.flush()?)
    }
}
