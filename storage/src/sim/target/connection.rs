//! One connection of a simulated target: bytes in, bytes out.

use super::frame::{Frame, FrameError, Frames};
use super::hostile::Saboteur;
use super::login::{Login, LoginAnswer, LoginOutcome};
use super::negotiation::Digests;
use super::session::Session;
use super::{State, Target};
use crate::iscsi::pdu::{InitiatorPdu, RejectReason, Serial, Window};
use crate::sim::dice::Dice;

/// The target's end of a connection. Nothing happens but inside its methods: what was received is
/// answered by a later [`Connection::transmit`].
///
/// ```text
///   Login ──last response──► Session ──logout, mistake, drop──► Closed
///     └─────refusal, redirect─────────────────────────────────►┘
/// ```
#[derive(Debug)]
pub struct Connection {
    target: Target,
    life: u64,
    dice: Dice,
    frames: Frames,
    phase: Phase,
    /// Login responses; in the full feature phase the session has the rest.
    ready: Vec<u8>,
    saboteur: Saboteur,
    closed: bool,
}

#[derive(Debug)]
enum Phase {
    Login(Login, Serial),
    Session(Box<Session>),
    /// It closes when all is sent.
    Parting,
}

impl Connection {
    pub(super) fn new(target: Target, life: u64, mut dice: Dice) -> Self {
        let stat_sn = Serial(u32::try_from(dice.below(1 << 32)).expect("it is below 2^32"));
        Self {
            target,
            life,
            dice,
            frames: Frames::default(),
            phase: Phase::Login(Login::new(), stat_sn),
            ready: Vec::new(),
            saboteur: Saboteur::default(),
            closed: false,
        }
    }

    /// Takes bytes that the initiator has sent, in any portions.
    pub fn receive(&mut self, bytes: &[u8]) {
        if self.closed || self.lost() || !self.listens() {
            return;
        }
        self.frames.extend(bytes);
        let target = self.target.clone();
        let mut state = target.state();
        loop {
            let digests = self.digests();
            let taken = self.frames.next(
                digests,
                state.options.limits.max_recv_data_segment_bytes.max(8192),
            );
            match taken {
                Ok(None) => return,
                Ok(Some(frame)) => self.take(frame, &mut state),
                Err(error) => return self.fail(error, &mut state),
            }
        }
    }

    /// The bytes to send now. With an unhurried [`super::options::Pace`], more may come by asking again.
    pub fn transmit(&mut self) -> Vec<u8> {
        if self.closed || self.lost() {
            return Vec::new();
        }
        let target = self.target.clone();
        let mut state = target.state();
        let mut bytes = std::mem::take(&mut self.ready);
        let digests = self.digests();
        match &mut self.phase {
            Phase::Login(..) => {}
            Phase::Parting => self.closed = true,
            Phase::Session(session) => {
                let hostility = state.options.hostility;
                for out in session.transmit(&mut state) {
                    bytes.extend(self.saboteur.spoil(out, digests, &hostility, &mut self.dice));
                }
                if session.is_silent() {
                    bytes.extend(self.saboteur.release());
                    self.closed = session.is_over;
                }
            }
        }
        if self.closed {
            self.leave(&mut state);
        }
        bytes
    }

    /// Whether [`Connection::transmit`] has, or may yet have, something to send although nothing more is received.
    pub fn is_busy(&self) -> bool {
        if self.closed {
            return false;
        }
        let state = self.target.state();
        !self.ready.is_empty()
            || self.saboteur.is_holding()
            || match &self.phase {
                Phase::Login(..) => false,
                Phase::Parting => true,
                Phase::Session(session) => session.is_over || session.is_busy(&state),
            }
    }

    /// Whether the target has closed the connection, after what it has transmitted.
    pub fn closed(&self) -> bool {
        self.closed || self.lost()
    }

    /// The connection is gone: nothing more comes or goes. Commands that arrived whole may go on.
    pub fn close(&mut self) {
        if !self.closed {
            self.closed = true;
            let target = self.target.clone();
            self.leave(&mut target.state());
        }
    }

    /// Whether the target was restarted, or its session was reinstated by another connection.
    fn lost(&self) -> bool {
        let state = self.target.state();
        let is_ended = match &self.phase {
            Phase::Session(session) => !state.sessions.contains_key(&session.nexus.session),
            Phase::Login(..) | Phase::Parting => false,
        };
        self.life != state.life || is_ended
    }

    /// Whether what comes is still looked at.
    fn listens(&self) -> bool {
        match &self.phase {
            Phase::Login(..) => true,
            Phase::Session(session) => !session.is_over,
            Phase::Parting => false,
        }
    }

    fn digests(&self) -> Digests {
        match &self.phase {
            Phase::Session(session) => session.negotiated.digests,
            Phase::Login(..) | Phase::Parting => Digests::default(),
        }
    }

    fn take(&mut self, frame: Frame, state: &mut State) {
        match &mut self.phase {
            Phase::Parting => {}
            Phase::Session(session) if session.is_over => {}
            Phase::Session(session) => session.receive(&frame.bhs, frame.data, state),
            Phase::Login(login, stat_sn) => {
                let Ok(InitiatorPdu::LoginRequest(request)) = InitiatorPdu::parse(&frame.bhs) else {
                    let what = format!("no Login Request, but {:?}", frame.bhs);
                    state.complaints.push(what);
                    self.phase = Phase::Parting;
                    return;
                };
                let redirect = state.redirect.clone();
                let answer = login.answer(
                    &request,
                    &frame.data,
                    &state.options,
                    redirect.as_ref(),
                    &mut self.dice,
                );
                let answered = *stat_sn;
                *stat_sn = stat_sn.next();
                self.answer_login(answer, answered, state);
            }
        }
    }

    fn answer_login(&mut self, answer: LoginAnswer, stat_sn: Serial, state: &mut State) {
        let mut response = answer.response;
        response.stat_sn = stat_sn;
        match answer.outcome {
            LoginOutcome::GoesOn => {}
            LoginOutcome::Refused => self.phase = Phase::Parting,
            LoginOutcome::Done(negotiated) => {
                let initiator = negotiated.initiator.clone().unwrap_or_default();
                let nexus = state.begin_session(&initiator, response.isid.0);
                response.tsih = u16::try_from(nexus.session % 0xffff).expect("it is below 2^16") + 1;
                let room = state.options.limits.commands_max;
                response.window = Window {
                    exp_cmd_sn: response.window.exp_cmd_sn,
                    max_cmd_sn: response.window.exp_cmd_sn.plus(room - 1),
                };
                let dice = self.dice.split();
                let session = Session::new(nexus, negotiated, response.window, stat_sn.next(), dice);
                self.phase = Phase::Session(Box::new(session));
            }
        }
        let frame = Frame {
            bhs: response.bhs(),
            data: answer.text,
        };
        self.ready.extend(frame.bytes(Digests::default()));
    }

    fn fail(&mut self, error: FrameError, state: &mut State) {
        state.complaints.push(error.to_string());
        match &mut self.phase {
            Phase::Session(session) => {
                if error == FrameError::DataDigest {
                    session.reject(
                        &crate::iscsi::pdu::Bhs::default(),
                        RejectReason::DATA_DIGEST_ERROR,
                    );
                }
                session.is_over = true;
            }
            Phase::Login(..) | Phase::Parting => self.phase = Phase::Parting,
        }
    }

    fn leave(&mut self, state: &mut State) {
        if let Phase::Session(session) = &self.phase {
            // A session of the target's former life is gone already, and a number is given once.
            state.end_session(session.nexus.session);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}
