//! The persistent reservation of a logical unit and the registrations under it (SPC-4, 5.12).

use super::cdb::Command;
use super::nexus::{Identity, Nexus};
use super::options::{Quirks, Support};
use super::refusal::{Attention, Illegal, Refusal};

/// Who is registered, and who holds the logical unit.
#[derive(Debug)]
pub(super) struct Reservations {
    quirks: Quirks,
    registrations: Vec<Registration>,
    held: Option<Held>,
    generation: u32,
}

#[derive(Debug)]
struct Registration {
    identity: Identity,
    key: u64,
}

#[derive(Debug)]
struct Held {
    holder: Identity,
    kind: Kind,
}

/// What a reservation keeps from whom (SPC-4, 5.12.9 and 6.15.3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrantsOnly = 5,
    ExclusiveAccessRegistrantsOnly = 6,
    WriteExclusiveAllRegistrants = 7,
    ExclusiveAccessAllRegistrants = 8,
}

/// What a PERSISTENT RESERVE OUT asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    action: u8,
    kind: u8,
    key: u64,
    service_action_key: u64,
}

/// What it means to others.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) notices: Vec<(Identity, Attention)>,
    /// Whose commands are aborted.
    pub(super) aborted: Vec<Identity>,
}

impl Reservations {
    pub(super) fn new(quirks: Quirks) -> Self {
        Self {
            quirks,
            registrations: Vec::new(),
            held: None,
            generation: 0,
        }
    }

    /// The keys, in the order of registration.
    pub(super) fn keys(&self) -> Vec<u64> {
        self.registrations
            .iter()
            .map(|registration| registration.key)
            .collect()
    }

    /// The key of the holder and the type of the reservation.
    pub(super) fn held(&self) -> Option<(u64, u8)> {
        let held = self.held.as_ref()?;
        let key = if held.kind.is_of_all_registrants() {
            0
        } else {
            self.key_of(&held.holder).unwrap_or(0)
        };
        Some((key, held.kind as u8))
    }

    /// Whether a nexus may write now.
    pub(super) fn lets_write(&self, nexus: &Nexus) -> bool {
        let Some(held) = &self.held else { return true };
        let identity = nexus.identity(self.quirks.registrant);
        if held.kind.trusts_registrants() {
            self.key_of(&identity).is_some()
        } else {
            held.holder == identity
        }
    }

    /// Whether a nexus may do what the command does.
    pub(super) fn allows(&self, nexus: &Nexus, command: Command) -> bool {
        let Some(held) = &self.held else { return true };
        self.lets_write(nexus)
            || match command {
                Command::Unmap { .. } | Command::WriteSame { .. } => !self.quirks.fences_unmap,
                Command::Write { .. }
                | Command::CompareAndWrite { .. }
                | Command::SynchronizeCache
                | Command::ModeSense { .. } => false,
                Command::Read(_) => held.kind.lets_read(),
                Command::TestUnitReady
                | Command::RequestSense { .. }
                | Command::Inquiry { .. }
                | Command::ReportLuns { .. }
                | Command::ReadCapacity10
                | Command::ReadCapacity16 { .. }
                | Command::ReservationIn { .. }
                | Command::ReservationOut { .. } => true,
            }
    }

    /// The parameter data of PERSISTENT RESERVE IN.
    pub(super) fn report(&self, action: u8) -> Result<Vec<u8>, Illegal> {
        let mut data = self.generation.to_be_bytes().to_vec();
        match action {
            0 => {
                let keys = self.keys();
                let len_bytes = u32::try_from(keys.len() * 8).expect("few sessions register");
                data.extend(len_bytes.to_be_bytes());
                data.extend(keys.into_iter().flat_map(u64::to_be_bytes));
            }
            1 => match self.held() {
                None => data.extend([0; 4]),
                Some((key, kind)) => {
                    data.extend(16_u32.to_be_bytes());
                    data.extend(key.to_be_bytes());
                    data.extend([0, 0, 0, 0, 0, kind, 0, 0]);
                }
            },
            // The types are named, and nothing else can be done.
            2 => data = vec![0, 8, 0, 0x80, 0xea, 0x01, 0, 0],
            _ => return Err(Illegal::FieldInCdb),
        }
        Ok(data)
    }

    /// Carries an order of `nexus` out.
    pub(super) fn obey(&mut self, nexus: &Nexus, order: Order) -> Result<Outcome, Refusal> {
        let me = nexus.identity(self.quirks.registrant);
        match order.action {
            0 => self.register(me, Some(order.key), order.service_action_key),
            6 => self.register(me, None, order.service_action_key),
            1 => self.reserve(me, order),
            2 => self.release(me, order),
            3 => self.clear(&me, order),
            4 => self.preempt(me, order),
            5 if self.quirks.preempt_and_abort == Support::Works => {
                let mut outcome = self.preempt(me, order)?;
                outcome.aborted = outcome.notices.iter().map(|(who, _)| who.clone()).collect();
                Ok(outcome)
            }
            _ => Err(Refusal::Illegal(Illegal::FieldInCdb)),
        }
    }

    fn key_of(&self, identity: &Identity) -> Option<u64> {
        let mut registrations = self.registrations.iter();
        let found = registrations.find(|registration| registration.identity == *identity);
        found.map(|registration| registration.key)
    }

    fn is_holder(&self, identity: &Identity) -> bool {
        let is_registered = self.key_of(identity).is_some();
        let is_held =
            |held: &Held| held.holder == *identity || (held.kind.is_of_all_registrants() && is_registered);
        self.held.as_ref().is_some_and(is_held)
    }

    /// REGISTER with the key that must be there, or REGISTER AND IGNORE EXISTING KEY without.
    fn register(&mut self, me: Identity, expected: Option<u64>, key: u64) -> Result<Outcome, Refusal> {
        let present = self.key_of(&me);
        if expected.is_some_and(|expected| expected != present.unwrap_or(0)) {
            return Err(Refusal::ReservationConflict);
        }
        let mut outcome = Outcome::default();
        if key == 0 {
            let was_holder = self.is_holder(&me);
            self.registrations
                .retain(|registration| registration.identity != me);
            // A reservation of all registrants ends with the last of them.
            let is_left = |held: &Held| held.kind.is_of_all_registrants() && !self.registrations.is_empty();
            if was_holder && !self.held.as_ref().is_some_and(is_left) {
                outcome.notices = self.drop_reservation(me);
            }
        } else {
            let mut registrations = self.registrations.iter_mut();
            match registrations.find(|registration| registration.identity == me) {
                Some(registration) => registration.key = key,
                None => self.registrations.push(Registration { identity: me, key }),
            }
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(outcome)
    }

    fn reserve(&mut self, me: Identity, order: Order) -> Result<Outcome, Refusal> {
        self.demand_key(&me, order)?;
        let kind = Kind::of(order.kind)?;
        match &self.held {
            Some(held) if held.kind == kind && self.is_holder(&me) => {}
            Some(_) => return Err(Refusal::ReservationConflict),
            None => self.held = Some(Held { holder: me, kind }),
        }
        Ok(Outcome::default())
    }

    fn release(&mut self, me: Identity, order: Order) -> Result<Outcome, Refusal> {
        if self.key_of(&me).is_none() {
            return Err(Refusal::ReservationConflict);
        }
        let is_holder = self.is_holder(&me);
        let Some(held) = self.held.as_ref().filter(|_| is_holder) else {
            return Ok(Outcome::default());
        };
        let held_kind = held.kind;
        self.demand_key(&me, order)?;
        if order.kind != held_kind as u8 {
            return Err(Refusal::Illegal(Illegal::InvalidRelease));
        }
        Ok(Outcome {
            notices: self.drop_reservation(me),
            ..Outcome::default()
        })
    }

    fn clear(&mut self, me: &Identity, order: Order) -> Result<Outcome, Refusal> {
        self.demand_key(me, order)?;
        self.held = None;
        self.generation = self.generation.wrapping_add(1);
        let gone = self
            .registrations
            .drain(..)
            .map(|registration| registration.identity);
        let others = gone.filter(|identity| identity != me);
        Ok(Outcome {
            notices: others
                .map(|identity| (identity, Attention::ReservationsPreempted))
                .collect(),
            ..Outcome::default()
        })
    }

    fn preempt(&mut self, me: Identity, order: Order) -> Result<Outcome, Refusal> {
        self.demand_key(&me, order)?;
        let kind = Kind::of(order.kind)?;
        let victim = order.service_action_key;
        let held = self.held();
        let takes_from_all =
            matches!(&self.held, Some(held) if held.kind.is_of_all_registrants()) && victim == 0;
        if victim == 0 && !takes_from_all {
            return Err(Refusal::Illegal(Illegal::FieldInCdb));
        }
        let takes_over = takes_from_all || matches!(held, Some((key, _)) if key == victim);
        if !takes_over && !self.keys().contains(&victim) {
            return Err(Refusal::ReservationConflict);
        }
        let (gone, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.registrations)
                .into_iter()
                .partition(|registration| {
                    registration.identity != me && (takes_from_all || registration.key == victim)
                });
        self.registrations = left;
        if takes_over {
            self.held = Some(Held { holder: me, kind });
        }
        self.generation = self.generation.wrapping_add(1);
        let attention = if self.quirks.names_preempted_registrations {
            Attention::RegistrationsPreempted
        } else {
            Attention::ReservationsPreempted
        };
        let notices = gone.into_iter().map(|gone| (gone.identity, attention)).collect();
        Ok(Outcome {
            notices,
            ..Outcome::default()
        })
    }

    /// Most orders are obeyed only if the sender is registered, with the key that it gives.
    fn demand_key(&self, me: &Identity, order: Order) -> Result<(), Refusal> {
        if self.key_of(me) == Some(order.key) {
            Ok(())
        } else {
            Err(Refusal::ReservationConflict)
        }
    }

    /// Ends the reservation, by the wish of its holder; whom that is told.
    fn drop_reservation(&mut self, me: Identity) -> Vec<(Identity, Attention)> {
        let held = self.held.take();
        let trusts_registrants = held.is_some_and(|held| held.kind.trusts_registrants());
        if self.quirks.alarms_releaser && !trusts_registrants {
            return vec![(me, Attention::ReservationsReleased)];
        }
        if self.quirks.alarms_releaser || !trusts_registrants {
            return Vec::new();
        }
        let registrations = self.registrations.iter();
        let others = registrations.filter(|registration| registration.identity != me);
        others
            .map(|registration| (registration.identity.clone(), Attention::ReservationsReleased))
            .collect()
    }
}

impl Order {
    /// Reads the parameter list. Neither is a reservation kept over a loss of power (APTPL), nor one registered for others.
    pub(super) fn parse(action: u8, kind: u8, list: &[u8]) -> Result<Self, Illegal> {
        let (keys, rest) = list.as_chunks::<8>();
        let ([key, service_action_key, [_, _, _, _, flags, ..]], []) = (keys, rest) else {
            return Err(Illegal::ParameterListLength);
        };
        if flags & 0x0d != 0 {
            return Err(Illegal::FieldInParameterList);
        }
        Ok(Self {
            action,
            kind,
            key: u64::from_be_bytes(*key),
            service_action_key: u64::from_be_bytes(*service_action_key),
        })
    }
}

impl Kind {
    fn of(kind: u8) -> Result<Self, Refusal> {
        Ok(match kind {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrantsOnly,
            6 => Self::ExclusiveAccessRegistrantsOnly,
            7 => Self::WriteExclusiveAllRegistrants,
            8 => Self::ExclusiveAccessAllRegistrants,
            _ => return Err(Refusal::Illegal(Illegal::FieldInCdb)),
        })
    }

    fn is_of_all_registrants(self) -> bool {
        matches!(
            self,
            Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants
        )
    }

    fn trusts_registrants(self) -> bool {
        self as u8 >= Self::WriteExclusiveRegistrantsOnly as u8
    }

    fn lets_read(self) -> bool {
        matches!(
            self,
            Self::WriteExclusive | Self::WriteExclusiveRegistrantsOnly | Self::WriteExclusiveAllRegistrants
        )
    }
}
