//! What can be wrong with a state.

use crate::keys::PublicKey;

/// Why something is no state, or not one of this machine.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum StateError {
    #[error("it is no state of a machine: it does not begin as one")]
    Magic,
    #[error("its header is damaged: the checksum is wrong")]
    Header,
    #[error(
        "it has format {found}, and this version reads format {known}: load it with the version that wrote it ({written_by})"
    )]
    Format {
        found: u32,
        known: u32,
        written_by: String,
    },
    #[error("it is of a machine of architecture {found}, and this host has {known} (ELF numbers)")]
    Architecture { found: u32, known: u32 },
    #[error("it is longer than any machine's")]
    Long,
    #[error("it has {found} sections, and no machine has as many")]
    Sections { found: u32 },
    #[error("{}is cut short: {missing_bytes} bytes are missing", named(section.as_deref()))]
    Short {
        section: Option<String>,
        missing_bytes: u64,
    },
    #[error("it does not end with its last section and the zeros that fill the block")]
    Trailing,
    #[error("section `{section}` is damaged: the checksum is wrong")]
    Damaged { section: String },
    #[error("section `{section}` is there twice")]
    Twice { section: String },
    #[error("section `{section}` is missing")]
    Missing { section: String },
    #[error("section `{section}` is not known to this version: load it with the one that wrote it")]
    Unknown { section: String },
    #[error(
        "section `{section}` has version {version}, and this version reads {known} and the one before it"
    )]
    Version {
        section: String,
        version: u32,
        known: u32,
    },
    #[error(
        "it is not signed, and only what a key in `{keys}` has signed may be loaded: make the snapshot with a `signing_key`"
    )]
    Unsigned { keys: String },
    #[error(
        "it is signed by {signer}, which is no key in `{keys}`: if you trust whoever has that key, add its public half there"
    )]
    Untrusted { signer: PublicKey, keys: String },
    #[error("it was changed since {signer} has signed it, or was never signed by that key: do not use it")]
    Signature { signer: PublicKey },
    #[error("it is encrypted: say where its key is (`encryption_key`, --encryption-key)")]
    NoKey,
    #[error("it is encrypted with another key than the one that was given")]
    OtherKey,
    #[error("it is not encrypted, and a key was given for it: leave the key out, if you expected that")]
    NotEncrypted,
    #[error("section `{section}` is not the one that was encrypted here: it was changed, or moved")]
    Forged { section: String },
    #[error("section `{section}` does not hold what it should")]
    Body {
        section: String,
        #[source]
        source: postcard::Error,
    },
}

fn named(section: Option<&str>) -> String {
    section.map_or_else(|| "it ".to_owned(), |name| format!("section `{name}` "))
}
