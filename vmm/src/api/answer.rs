//! How a verb went: what a client is told.

use serde::Serialize;

use super::http::{Content, Response, Status};
use crate::config::ConfigError;

/// How a verb went.
pub type Answer = Result<Data, Fault>;

/// What a verb that went well says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Nothing.
    Empty,
    /// A body.
    Body(Content, String),
    /// A line of JSON. Unless it is the last one, the client is to be told what comes of asking again.
    Line {
        /// Without its end.
        text: String,
        /// Whether nothing will come of it.
        is_last: bool,
    },
}

impl Data {
    /// `value` as JSON.
    pub fn json(value: &impl Serialize) -> Self {
        let text =
            serde_json::to_string(value).expect("the API's types have string keys and no failing parts");
        Self::Body(Content::Json, text)
    }

    /// `value` as a line of JSON.
    pub fn line(value: &impl Serialize, is_last: bool) -> Self {
        let text =
            serde_json::to_string(value).expect("the API's types have string keys and no failing parts");
        Self::Line { text, is_last }
    }
}

/// Why a verb is refused or failed, for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The status.
    pub status: Status,
    /// What to tell the client: what is wrong, and what to do.
    pub message: String,
}

impl Fault {
    /// The client asked for something that cannot be done.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self {
            status: Status::BadRequest,
            message: message.into(),
        }
    }

    /// An error with its causes, in one line.
    pub fn from_error(error: &dyn std::error::Error) -> Self {
        Self::bad_request(chain(error))
    }

    /// The fault as a response.
    pub fn response(&self) -> Response {
        let body = serde_json::json!({ "fault_message": self.message }).to_string();
        Response {
            status: self.status,
            body: Some((Content::Json, body)),
            deprecated: false,
        }
    }
}

/// An error and its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

impl From<ConfigError> for Fault {
    fn from(error: ConfigError) -> Self {
        Self::from_error(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_firecrackers_body() {
        let response = Fault::bad_request("say \"why\"").response();
        assert_eq!(
            response.body,
            Some((Content::Json, r#"{"fault_message":"say \"why\""}"#.to_owned()))
        );
    }

    #[test]
    fn a_fault_tells_every_cause() {
        let source = std::io::Error::other("the disk is on fire");
        let error = crate::config::BootSourceError::Kernel {
            path: "k".to_owned(),
            source,
        };
        assert!(
            Fault::from_error(&error)
                .message
                .ends_with("permissions: the disk is on fire")
        );
    }
}
