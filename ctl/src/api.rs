//! `coraclectl api`: one request to a machine's API, as it is.

use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;

use clap::Args;
use serde_json::json;
use thiserror::Error;

use crate::client::{Client, ClientError, Request};
use crate::discovery::{FindError, resolve, resolve_only};
use crate::output::{Format, OutputError, note, note_json, print_bytes};

/// More than any monitor takes.
const BODY_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// What `coraclectl` returns when the API refuses.
const EXIT_REFUSED: u8 = 1;

/// Send one request to a machine's API and print the answer's body
///
/// Ends with status 1 when the API refuses, and says why on standard error.
#[derive(Debug, Args)]
pub(crate) struct ApiArgs {
    /// A machine's name, or the path of its API socket [default: the only one that runs]
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    /// How long the answer may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
    /// GET, PUT, PATCH, …
    #[arg(value_parser = method)]
    method: String,
    /// The path, such as /machine-config
    #[arg(value_parser = path)]
    path: String,
    /// The body: JSON, @FILE, or - for standard input
    #[arg(value_name = "JSON")]
    body: Option<String>,
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub(crate) enum ApiError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error("cannot read the body from {from}")]
    Body {
        from: String,
        #[source]
        source: io::Error,
    },
    #[error("the body from {from} is longer than {BODY_BYTES_MAX} bytes")]
    BodyTooLong { from: String },
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Sends the request and prints the body of the answer; returns the exit status.
///
/// # Errors
///
/// When there is no such machine, or no answer.
pub(crate) fn api(args: &ApiArgs, format: Format) -> Result<u8, ApiError> {
    let socket = match &args.vm {
        Some(vm) => resolve(vm)?,
        None => resolve_only()?,
    };
    let body = args.body.as_deref().map(body_text).transpose()?;
    let (method, path) = (args.method.as_str(), args.path.as_str());
    let wait = Duration::from_secs(args.timeout);
    let response = Client::new(&socket).ask(Request {
        method,
        path,
        body: body.as_deref(),
        wait,
    })?;
    if response.is_refusal() {
        let refusal = format!(
            "{method} {path} was refused with status {}: {}",
            response.status,
            response.fault()
        );
        match format {
            Format::Json => note_json(&json!({ "error": refusal, "causes": [] })),
            Format::Text => note(refusal),
        }
    }
    if !response.is_refusal() || format == Format::Json {
        print_line(&response.body)?;
    }
    Ok(if response.is_refusal() { EXIT_REFUSED } else { 0 })
}

/// Prints a body, with the line's end that it may lack.
fn print_line(body: &[u8]) -> Result<(), OutputError> {
    print_bytes(body)?;
    let is_open = body.last().is_some_and(|last| *last != b'\n');
    if is_open { print_bytes(b"\n") } else { Ok(()) }
}

fn body_text(argument: &str) -> Result<String, ApiError> {
    let body_error = |source| ApiError::Body {
        from: argument.to_owned(),
        source,
    };
    match argument.strip_prefix('@') {
        Some(file) => read_bounded(File::open(file).map_err(body_error)?, file),
        None if argument == "-" => read_bounded(io::stdin(), "standard input"),
        None => Ok(argument.to_owned()),
    }
}

fn read_bounded(reader: impl Read, from: &str) -> Result<String, ApiError> {
    let mut text = String::new();
    let read = reader.take(BODY_BYTES_MAX + 1).read_to_string(&mut text);
    let bytes = read.map_err(|source| ApiError::Body {
        from: from.to_owned(),
        source,
    })?;
    match u64::try_from(bytes) {
        Ok(..=BODY_BYTES_MAX) => Ok(text),
        _ => Err(ApiError::BodyTooLong {
            from: from.to_owned(),
        }),
    }
}

fn method(text: &str) -> Result<String, String> {
    let is_method = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphabetic());
    if is_method {
        Ok(text.to_ascii_uppercase())
    } else {
        Err("a method is a word, such as GET".to_owned())
    }
}

fn path(text: &str) -> Result<String, String> {
    let is_path = text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic());
    if is_path {
        Ok(text.to_owned())
    } else {
        Err("a path begins with a slash and has no spaces".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_argument_can_add_a_line_to_the_request() {
        assert_eq!(method("get"), Ok("GET".to_owned()));
        assert!(
            ["", "GET /", "G\r\nX: y", "GÉT"]
                .iter()
                .all(|text| method(text).is_err())
        );
        assert_eq!(path("/drives/root"), Ok("/drives/root".to_owned()));
        assert!(
            ["", "vm", "/a b", "/a\r\nX: y", "/é"]
                .iter()
                .all(|text| path(text).is_err())
        );
    }

    #[test]
    fn a_body_is_text_or_comes_from_a_file() {
        let file = tempfile::NamedTempFile::new().expect("a scratch file");
        std::fs::write(file.path(), "{\"a\":1}").expect("the file is ours");
        let named = format!("@{}", file.path().display());
        assert_eq!(body_text(&named).ok().as_deref(), Some("{\"a\":1}"));
        assert_eq!(body_text("{}").ok().as_deref(), Some("{}"));
        assert!(matches!(body_text("@/no/such/file"), Err(ApiError::Body { .. })));
    }

    #[test]
    fn a_body_without_end_is_refused() {
        assert!(matches!(
            read_bounded(io::repeat(b'x'), "x"),
            Err(ApiError::BodyTooLong { .. })
        ));
    }
}
