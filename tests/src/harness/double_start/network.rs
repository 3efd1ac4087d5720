//! What a schedule does to the way between writers and their image, where there is one.

use super::{Expected, Schedule, State};
use crate::Outcome;

/// Storage behind a server that many reach, each in his own way. A start is known by its number, from 1.
pub trait Network {
    /// Kills the server, and starts it again: what it had in memory alone is gone.
    ///
    /// # Errors
    ///
    /// When it does not come back.
    fn restart(&self) -> Outcome;

    /// The writer of this start and the server hear nothing of each other any more; nobody is told.
    ///
    /// # Errors
    ///
    /// When there was no such start.
    fn cut_off(&self, start: u64) -> Outcome;

    /// They hear of each other again, and what they have sent meanwhile arrives.
    ///
    /// # Errors
    ///
    /// When there was no such start.
    fn heal(&self, start: u64) -> Outcome;

    /// The arguments that name the image to `coraclectl lease`.
    fn image(&self) -> Vec<String>;

    /// What must become of breaking the lease of a writer in this state, when he is the last that held it.
    fn broken(&self, holder: State) -> Expected {
        let _whatever_it_is = holder;
        Expected::Granted
    }
}

impl Schedule<'_> {
    /// One step that only a network has.
    pub(super) fn upheaval(&mut self, network: &dyn Network, kind: u64) -> Outcome {
        if kind == 0 {
            self.done.push("restart".into());
            return network.restart();
        }
        if kind == 1
            && let Some((_, _, state)) = self.last
        {
            // What is free cannot be broken.
            return match state {
                State::Ended | State::Broken => Ok(()),
                _ => self.break_lease(network),
            };
        }
        let index = usize::try_from(self.seed.below(u64::try_from(self.alive.len().max(1))?))?;
        let Some(writer) = self.alive.get_mut(index) else {
            return Ok(());
        };
        writer.is_cut_off = !writer.is_cut_off;
        if writer.is_cut_off {
            self.done.push(format!("cut off {}", writer.number));
            network.cut_off(writer.number)
        } else {
            self.done.push(format!("heal {}", writer.number));
            network.heal(writer.number)
        }
    }

    /// Takes the lease from whoever has it: what he has written until then is his, and nothing after it.
    pub(super) fn break_lease(&mut self, network: &dyn Network) -> Outcome {
        let Some((number, vm, state)) = self.last else {
            return Ok(());
        };
        self.done.push(format!("break {number}"));
        let broken = std::process::Command::new(&self.environment.coraclectl)
            .args(["lease", "break"])
            .args(network.image())
            .arg("--yes")
            .output()?;
        let said = String::from_utf8_lossy(&broken.stderr).trim().to_owned();
        match (network.broken(state), broken.status.success()) {
            (Expected::Granted | Expected::Either, true) => {}
            (Expected::Refused, true) => {
                return Err(format!("the lease of {vm} was broken while he has it").into());
            }
            (Expected::Granted, false) => {
                return Err(format!("the lease of {vm} cannot be broken: {said}").into());
            }
            (Expected::Refused | Expected::Either, false) => {
                crate::ensure!(
                    self.backend.is_refusal(&said, vm),
                    "that {vm} has it is not said: {said}"
                );
                return Ok(());
            }
        }
        self.oracle.gone(number);
        self.last = Some((number, vm, State::Broken));
        self.look()
    }
}
