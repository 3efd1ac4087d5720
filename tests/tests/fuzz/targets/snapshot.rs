//! The state file of a snapshot: an input is a file, or the bodies of sections, which no search would find the checksums for,
//! or a list of keys.

use std::path::Path;
use std::sync::LazyLock;

use coracle_storage::secret::SecretSource;
use coracle_vmm::keys::{
    EncryptionKey, Protection, PublicKey, ReadingKeys, SigningKey, SnapshotCipher, TrustedKeys,
};

use coracle_vmm::snapshot::load::StateFile;
use coracle_vmm::state::{Header, SECTIONS_MAX, Sections, State};

use super::Input;

/// What a state has, and what it has not.
const NAMES: [&str; 14] = [
    "origin",
    "config",
    "memory",
    "vm",
    "vcpu.0",
    "vcpu.1",
    "virtio.0",
    "virtio.1",
    "serial",
    "keyboard",
    "drives",
    "encryption",
    "signature",
    "other",
];

/// A signer, and who trusts it; what is encrypted with.
struct Keys {
    pem: &'static str,
    trusted: TrustedKeys,
    encryption: EncryptionKey,
    cipher: SnapshotCipher,
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let pem = "-----BEGIN PRIVATE KEY-----\n\
               MC4CAQAwBQYDK2VwBCIEIFF7UUjlXdKfq1awAJ81hdFPXh5N9srvwTE7OgpXgJaz\n\
               -----END PRIVATE KEY-----\n";
    let public = format!(
        "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
        signing_key(pem).public()
    );
    let encryption = EncryptionKey::parse(&place(), &[7; 32]).expect("a key has 32 bytes");
    Keys {
        pem,
        trusted: TrustedKeys::parse(Path::new("keys"), public.as_bytes()).expect("it is a key"),
        cipher: SnapshotCipher::new(encryption.clone()).expect("hosts have random bytes"),
        encryption,
    }
});

fn place() -> SecretSource {
    SecretSource::File("fuzz".into())
}

fn signing_key(pem: &str) -> SigningKey {
    SigningKey::parse(&place(), pem.as_bytes()).expect("openssl has made it")
}

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() {
        0 => check(input.rest(), &ReadingKeys::default()),
        1 => check(&made_of(input).finish(), &ReadingKeys::default()),
        2 => protect(input),
        3 => {
            let _ = TrustedKeys::parse(Path::new("fuzz"), input.rest());
        }
        4 => {
            let _ = SigningKey::parse(&place(), input.rest());
        }
        _ => drop(Header::parse(input.rest())),
    }
}

/// A state that is signed or encrypted is what was written, or nothing.
fn protect(mut input: Input<'_>) {
    let how = input.u8();
    let (is_signed, is_encrypted) = (how & 1 != 0, how & 2 != 0);
    let (place, change) = (usize::from(input.u16()), input.u8());
    let protection = Protection {
        signing: is_signed.then(|| signing_key(KEYS.pem)),
        cipher: is_encrypted.then(|| KEYS.cipher.clone()),
    };
    let signer = protection.signing.as_ref().map(SigningKey::public);
    let mut state = made_of(input).finish_with(&protection);
    let keys = ReadingKeys {
        trusted: is_signed.then(|| KEYS.trusted.clone()).into_iter().collect(),
        encryption: is_encrypted.then(|| KEYS.encryption.clone()),
    };
    if change == 0 {
        check(&state, &keys);
        check_signer(&state, &keys, signer);
        return;
    }
    let place = place % state.len();
    if let Some(byte) = state.get_mut(place) {
        *byte ^= change;
    }
    assert!(
        State::parse(&state, &keys).is_err(),
        "a changed byte was not seen"
    );
}

fn check_signer(state: &[u8], keys: &ReadingKeys, signer: Option<PublicKey>) {
    // Sections that are there twice are refused, whoever has signed them.
    if let Ok(state) = State::parse(state, keys) {
        assert_eq!(state.signer(), signer);
    }
}

/// A state whose sections are: the place of a name in the list, a version, a length, a body.
fn made_of(mut input: Input<'_>) -> Sections {
    let mut sections = Sections::default();
    let mut count = 0;
    while !input.is_empty() && count < SECTIONS_MAX - 2 {
        let name = NAMES
            .get(usize::from(input.u8()) % NAMES.len())
            .copied()
            .unwrap_or("other");
        let version = u32::from(input.u8() % 3);
        let length = usize::from(input.u16());
        sections.add_written(name, version, input.take(length));
        count += 1;
    }
    sections
}

fn check(bytes: &[u8], keys: &ReadingKeys) {
    let file = StateFile::of(Path::new("fuzz"), bytes.to_vec());
    if let Ok(snapshot) = file.parse(keys) {
        let mib = snapshot.config.machine().mem_size_mib;
        assert_eq!(
            snapshot.table.size_bytes(),
            mib << 20,
            "a table is of the machine's memory"
        );
    }
}
