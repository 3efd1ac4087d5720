//! What a clone has for itself on this host: a tap for each of its network interfaces, and a socket.

use coracle_vmm::config::Config;
use serde_json::{Value, json};
use thiserror::Error;

use super::CloneArgs;
use crate::here::Overridden;
use crate::output::path_text;
use crate::run::Step;
use crate::runtime_dir::RuntimeDir;

/// Where the number of a clone goes.
const NUMBER: &str = "{}";
/// The socket of a vsock device, in the runtime directory of its machine.
const VSOCK_NAME: &str = "v.sock";

/// Why clones cannot have what they were told.
#[derive(Debug, Error)]
pub(crate) enum PlacesError {
    #[error(
        "{given}: there are {count} clones, and each needs its own: put {NUMBER} where the number of a clone goes"
    )]
    One { given: String, count: u16 },
    #[error(
        "{count} clones cannot have the tap {tap} of the network interface {id} together: make {count} taps, such as {tap}-1 and \
         so on, and say --net {id}={tap}-{NUMBER}"
    )]
    Tap { id: String, tap: String, count: u16 },
}

/// What each clone has for itself, but for its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Places {
    nets: Vec<(String, String)>,
    vsock: Socket,
}

/// The socket of a vsock device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Socket {
    /// There is no such device.
    None,
    /// In the runtime directory of each clone.
    InDirectory,
    /// Where that says, with its number.
    At(String),
}

impl Places {
    /// What `args` say for the machine `config`.
    ///
    /// # Errors
    ///
    /// When several clones would have the same.
    pub(super) fn of(args: &CloneArgs, config: &Config) -> Result<Self, PlacesError> {
        let count = args.count;
        let nets = args.nets.iter().map(|(_, tap)| tap);
        let has_one_for_all = |given: &&String| count > 1 && !given.contains(NUMBER);
        if let Some(given) = nets.chain(&args.vsock).find(has_one_for_all) {
            let given = given.clone();
            return Err(PlacesError::One { given, count });
        }
        let is_told = |id: &str| args.nets.iter().any(|(told, _)| told == id);
        let mut untold = config
            .networks()
            .iter()
            .filter(|network| !is_told(&network.iface_id));
        if count > 1
            && let Some(network) = untold.next()
        {
            let (id, tap) = (network.iface_id.clone(), network.host_dev_name.clone());
            return Err(PlacesError::Tap { id, tap, count });
        }
        Ok(Self {
            nets: args.nets.clone(),
            vsock: match &args.vsock {
                Some(path) => Socket::At(path.clone()),
                None if config.vsock().is_some() => Socket::InDirectory,
                None => Socket::None,
            },
        })
    }

    /// What clone `number` is told, whose runtime directory is `dir`, beside what all are.
    pub(super) fn told(&self, step: &Step, number: u16, dir: &RuntimeDir) -> Step {
        let with_number = |text: &str| text.replace(NUMBER, &number.to_string());
        let nets = self.nets.iter();
        let nets = nets.map(|(id, tap)| json!({ "iface_id": id, "host_dev_name": with_number(tap) }));
        let socket = match &self.vsock {
            Socket::None => None,
            Socket::InDirectory => Some(path_text(&dir.path().join(VSOCK_NAME))),
            Socket::At(path) => Some(with_number(path)),
        };
        let mut step = step.clone();
        if let Some(body) = step.body.as_object_mut() {
            if !self.nets.is_empty() {
                body.insert(Overridden::Networks.of_load().to_owned(), Value::from_iter(nets));
            }
            if let Some(path) = socket {
                let path = json!({ "uds_path": path });
                body.insert(Overridden::Vsock.of_load().to_owned(), path);
            }
        }
        step
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        clone: CloneArgs,
    }

    fn places(flags: &str) -> Result<Places, PlacesError> {
        let mut config = Config::default();
        let network = json!({ "iface_id": "eth0", "host_dev_name": "tap0" });
        config
            .insert_network(serde_json::from_value(network).unwrap())
            .unwrap();
        let line = format!("clone /s /m{flags}");
        Places::of(&Line::parse_from(line.split(' ')).clone, &config)
    }

    #[test]
    fn several_clones_have_taps_and_sockets_of_their_own() {
        let refusal = |flags| places(flags).unwrap_err().to_string();
        assert!(refusal(" --count 2").contains("say --net eth0=tap0-{}"));
        assert!(refusal(" --count 2 --net eth0=tap7").contains("each needs its own"));
        assert!(refusal(" --count 2 --net eth0=t{} --vsock /v").contains("each needs its own"));
        let one = places(" --count 1").unwrap();
        assert_eq!((one.nets.len(), one.vsock), (0, Socket::None));
        let both = places(" --count 2 --net eth0=t{} --vsock /v{}").unwrap();
        assert_eq!(both.nets, [("eth0".to_owned(), "t{}".to_owned())]);
        assert_eq!(both.vsock, Socket::At("/v{}".to_owned()));
    }
}
