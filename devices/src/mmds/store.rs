//! What there is to know, for all interfaces of a machine.

use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::token::{TTL_S_MAX, Tokens};

/// Longest content as text unless the command line says otherwise, in bytes.
const CONTENT_BYTES_MAX_DEFAULT: usize = 51_200;

/// How a guest asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MmdsVersion {
    /// By a request; a token is looked at and not needed.
    #[default]
    V1,
    /// By a request with a token that it has asked for before.
    V2,
}

/// What the service has done, for metrics.
#[derive(Debug, Default)]
pub struct MmdsCounts {
    /// Frames of guests that were for it.
    pub rx_frames: AtomicU64,
    /// Frames that it had no room for.
    pub rx_dropped: AtomicU64,
    /// Requests.
    pub requests: AtomicU64,
    /// Requests with a token that was none, or over.
    pub invalid_tokens: AtomicU64,
    /// Requests without a token.
    pub no_tokens: AtomicU64,
    /// Frames that guests were given.
    pub tx_frames: AtomicU64,
    /// Their bytes.
    pub tx_bytes: AtomicU64,
    /// Connections begun.
    pub opened: AtomicU64,
    /// Connections ended, by whomever.
    pub closed: AtomicU64,
}

/// Why content is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MmdsError {
    /// There is nothing to be changed.
    #[error("The MMDS data store is not initialized: send all of it first (PUT /mmds)")]
    Uninitialized,
    /// It is too long.
    #[error(
        "The MMDS data store would have more than {0} bytes: store less, or start with a larger --mmds-size-limit"
    )]
    TooLong(usize),
}

/// The metadata of a machine, and how its guest may ask for it.
#[derive(Debug)]
pub struct Mmds {
    store: Mutex<Store>,
    pub(super) counts: MmdsCounts,
}

#[derive(Debug)]
struct Store {
    version: MmdsVersion,
    imds_compat: bool,
    content: Option<Value>,
    bytes_max: usize,
    tokens: Tokens,
}

/// What a guest finds at a path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// As it asked for it.
    Text(String),
    /// Nothing.
    Nothing,
    /// What only JSON can say.
    Unsupported,
}

/// How it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// As it is.
    Json,
    /// As EC2 does: an object as its keys, one in a line, and a string as it is.
    Imds,
}

impl Mmds {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            store: Mutex::new(Store {
                version: MmdsVersion::default(),
                imds_compat: false,
                content: None,
                bytes_max: CONTENT_BYTES_MAX_DEFAULT,
                tokens: Tokens::new(),
            }),
            counts: MmdsCounts::default(),
        }
    }

    /// Lets the content have so many bytes as text from now on.
    pub fn limit(&self, bytes_max: usize) {
        self.store().bytes_max = bytes_max;
    }

    /// Has guests ask so from now on; with `imds_compat` they are answered as by EC2, whatever they accept.
    pub fn configure(&self, version: MmdsVersion, imds_compat: bool) {
        let mut store = self.store();
        store.version = version;
        store.imds_compat = imds_compat;
    }

    /// Replaces the content.
    ///
    /// # Errors
    ///
    /// It is too long; then nothing has changed.
    pub fn put(&self, content: Value) -> Result<(), MmdsError> {
        self.store().replace(content)
    }

    /// Changes the content by a merge patch (RFC 7396).
    ///
    /// # Errors
    ///
    /// There is none, or it would be too long; then nothing has changed.
    pub fn patch(&self, patch: Value) -> Result<(), MmdsError> {
        let mut store = self.store();
        let mut content = store.content.clone().ok_or(MmdsError::Uninitialized)?;
        merge(&mut content, patch);
        store.replace(content)
    }

    /// All of it; an empty object as long as there is nothing.
    pub fn content(&self) -> Value {
        let content = self.store().content.clone();
        content.unwrap_or_else(|| Value::Object(Map::new()))
    }

    /// What the service has done so far.
    pub fn counts(&self) -> &MmdsCounts {
        &self.counts
    }

    pub(super) fn version(&self) -> MmdsVersion {
        self.store().version
    }

    /// The format of an answer to a guest that accepts `accepted`.
    pub(super) fn format(&self, accepted: Format) -> Format {
        if self.store().imds_compat {
            Format::Imds
        } else {
            accepted
        }
    }

    /// What is at a path, whose parts are keys and numbers of elements (RFC 6901).
    pub(super) fn find(&self, path: &str, format: Format) -> Found {
        let store = self.store();
        // One slash after the other names nothing between them.
        let pointer: String = path
            .split('/')
            .filter(|part| !part.is_empty())
            .flat_map(|part| ["/", part])
            .collect();
        let found = store
            .content
            .as_ref()
            .and_then(|content| content.pointer(&pointer));
        match (found, format) {
            (None, _) => Found::Nothing,
            (Some(value), Format::Json) => Found::Text(value.to_string()),
            (Some(Value::String(text)), Format::Imds) => Found::Text(text.clone()),
            (Some(Value::Object(object)), Format::Imds) => Found::Text(keys(object)),
            (Some(_), Format::Imds) => Found::Unsupported,
        }
    }

    /// A token that is good for so many seconds, or nothing if no token lives as short or long.
    pub(super) fn make_token(&self, ttl_s: u32) -> Option<String> {
        let ttl = Duration::from_secs(ttl_s.into());
        let is_ttl = (1..=TTL_S_MAX).contains(&ttl_s);
        is_ttl.then(|| self.store().tokens.make(ttl, SystemTime::now()))
    }

    pub(super) fn knows_token(&self, token: &str) -> bool {
        self.store().tokens.knows(token, SystemTime::now())
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Mmds {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    fn replace(&mut self, content: Value) -> Result<(), MmdsError> {
        if content.to_string().len() > self.bytes_max {
            return Err(MmdsError::TooLong(self.bytes_max));
        }
        self.content = Some(content);
        Ok(())
    }
}

fn keys(object: &Map<String, Value>) -> String {
    let lines = object.iter().map(|(key, value)| {
        let end = if value.is_object() { "/" } else { "" };
        format!("{key}{end}")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// RFC 7396, 2: an object in a patch changes what it names, and takes out where it has `null`; all else takes the place of what
/// was there. A patch is as deep as JSON that is parsed may be.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else {
        return;
    };
    for (key, value) in patch {
        if value.is_null() {
            fields.remove(&key);
        } else {
            merge(fields.entry(key).or_insert(Value::Null), value);
        }
    }
}
