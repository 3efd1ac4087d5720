//! What is done outside of any session: clients and sessions come and go (RFC 8881, 18.34 to 18.37 and 18.50).

use super::state::State;
use crate::nfs::v4::{
    Arguments, BindConnToSession, BindConnToSessionResult, ChannelFromServer, ClientId, CreateSession,
    CreateSessionResult, ExchangeId, ExchangeIdResult, Results, SessionId, StateProtect, Status,
};

impl State {
    /// What is done outside of any session.
    pub(super) fn alone(
        &mut self,
        connection: u64,
        only: &Arguments<'_>,
    ) -> Result<Results<'static>, Status> {
        self.expire_silent();
        match only {
            Arguments::ExchangeId(exchange) => Ok(Results::ExchangeId(self.exchange_id(exchange))),
            Arguments::CreateSession(create) => {
                let created = self.create_session(connection, create)?;
                Ok(Results::CreateSession(created))
            }
            Arguments::BindConnToSession(bind) => self.bind(connection, bind),
            Arguments::DestroySession(id) => self.destroy_session(*id),
            Arguments::DestroyClientid(id) => self.destroy_client(*id),
            other => {
                self.complaints
                    .push(format!("{} without a session", other.operation()));
                Err(Status::OP_NOT_IN_SESSION)
            }
        }
    }

    fn exchange_id(&mut self, exchange: &ExchangeId) -> ExchangeIdResult {
        let exchanged = self
            .clients
            .exchange(&exchange.client_owner, self.life, self.now());
        let confirmed = if exchanged.is_confirmed {
            ExchangeId::CONFIRMED_R
        } else {
            0
        };
        ExchangeIdResult {
            client_id: ClientId(exchanged.client),
            sequence_id: exchanged.sequence_id,
            flags: ExchangeId::USE_NON_PNFS | confirmed,
            state_protect: StateProtect::None,
            server_minor_id: 0,
            server_major_id: b"simulated".to_vec(),
            server_scope: b"simulated".to_vec(),
            implementation: None,
        }
    }

    fn create_session(
        &mut self,
        connection: u64,
        create: &CreateSession,
    ) -> Result<CreateSessionResult, Status> {
        let id = create.client_id.0;
        let client = self.clients.get(id).ok_or(Status::STALE_CLIENTID)?;
        if create.sequence_id.wrapping_add(1) == client.sequence_id
            && let Some(last) = &client.last
        {
            return Ok(last.clone());
        }
        if create.sequence_id != client.sequence_id {
            // An old connection may deliver what is over; nobody waits for an answer.
            if create.sequence_id.wrapping_sub(client.sequence_id) < u32::MAX / 2 {
                self.complaints.push(format!(
                    "CREATE_SESSION {} where {} is next",
                    create.sequence_id, client.sequence_id
                ));
            }
            return Err(Status::SEQ_MISORDERED);
        }
        if !client.is_confirmed
            && let Some(before) = self.clients.confirm(id)
        {
            self.rights.forget(before);
            self.drop_sessions(before);
        }
        let slots = create.fore_channel.max_requests.min(self.options.limits.slots);
        let session_id = self.begin_session(id, slots.max(1), create.callback_program, connection);
        let mut fore_channel = create.fore_channel;
        fore_channel.max_requests = slots.max(1);
        let most = self.options.limits.message_bytes_max;
        fore_channel.max_request_size = fore_channel.max_request_size.min(most);
        fore_channel.max_response_size = fore_channel.max_response_size.min(most);
        let created = CreateSessionResult {
            session_id,
            sequence_id: create.sequence_id,
            flags: create.flags & CreateSession::CONN_BACK_CHAN,
            fore_channel,
            back_channel: create.back_channel,
        };
        self.clients.renew(id, self.now());
        if let Some(client) = self.clients.get_mut(id) {
            client.sequence_id = client.sequence_id.wrapping_add(1);
            client.last = Some(created.clone());
        }
        Ok(created)
    }

    fn bind(&mut self, connection: u64, bind: &BindConnToSession) -> Result<Results<'static>, Status> {
        let number = self.session(bind.session_id).ok_or(Status::BADSESSION)?;
        let session = self.sessions.get_mut(&number).ok_or(Status::BADSESSION)?;
        session.bound.insert(connection);
        Ok(Results::BindConnToSession(BindConnToSessionResult {
            session_id: bind.session_id,
            direction: ChannelFromServer::Both,
            use_rdma: false,
        }))
    }

    /// Ends a session, unless something is being carried out there.
    pub(super) fn destroy_session(&mut self, id: SessionId) -> Result<Results<'static>, Status> {
        let number = self.session(id).ok_or(Status::BADSESSION)?;
        if self.tasks.iter().any(|task| task.session == number) {
            return Err(Status::DELAY);
        }
        self.sessions.remove(&number);
        Ok(Results::DestroySession)
    }

    fn destroy_client(&mut self, ClientId(id): ClientId) -> Result<Results<'static>, Status> {
        self.clients.get(id).ok_or(Status::STALE_CLIENTID)?;
        if self.sessions.values().any(|session| session.client == id) || self.rights.has_any(id) {
            return Err(Status::CLIENTID_BUSY);
        }
        self.clients.remove(id);
        Ok(Results::DestroyClientid)
    }
}
