//! What a target is to be: its logical units, its side of the negotiation, its secrets.

use std::path::{Path, PathBuf};

use crate::Outcome;

/// What a target is to be. It has no logical unit until it is given one; the first is LUN 1, as tgtd keeps 0 for itself.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(super) luns: Vec<Lun>,
    pub(super) keys: Vec<(String, String)>,
    pub(super) incoming: Option<Account>,
    pub(super) outgoing: Option<Account>,
    pub(super) threads: u32,
}

/// One logical unit, blank when the target starts for the first time.
#[derive(Clone, Debug)]
pub struct Lun {
    pub(super) bytes: u64,
    pub(super) block_bytes: u32,
    pub(super) image: Option<PathBuf>,
    pub(super) is_read_only: bool,
    pub(super) has_write_cache: bool,
    pub(super) is_thin: bool,
}

#[derive(Clone, Debug)]
/// Who somebody is, and how he proves it.
pub(super) struct Account {
    pub(super) user: String,
    pub(super) secret: String,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            luns: vec![],
            keys: vec![],
            incoming: None,
            outgoing: None,
            threads: 2,
        }
    }
}

impl Plan {
    /// With one logical unit of so many bytes, and all else as tgtd has it.
    pub fn disk(bytes: u64) -> Self {
        Self::default().lun(Lun::new(bytes))
    }

    /// With so many threads for each logical unit.
    #[must_use]
    pub fn threads(mut self, count: u32) -> Self {
        self.threads = count;
        self
    }

    /// With one more logical unit.
    #[must_use]
    pub fn lun(mut self, lun: Lun) -> Self {
        self.luns.push(lun);
        self
    }

    /// With a key of the negotiation (RFC 7143, 13) set to what the target shall insist on or offer: `HeaderDigest`,
    /// `InitialR2T`, `MaxRecvDataSegmentLength`; or one of tgtd's own: `nop_interval`, `MaxQueueCmd`.
    #[must_use]
    pub fn key(mut self, name: &str, value: &str) -> Self {
        self.keys.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Both digests are CRC32C; with none of them, neither side asks for one.
    #[must_use]
    pub fn digests(self) -> Self {
        self.key("HeaderDigest", "CRC32C").key("DataDigest", "CRC32C")
    }

    /// All data of a write of up to so many bytes comes with its command. The proxy's volatile mode holds such writes only.
    #[must_use]
    pub fn immediate_bytes(self, bytes: u32) -> Self {
        let bytes = bytes.to_string();
        self.key("ImmediateData", "Yes")
            .key("InitialR2T", "No")
            .key("MaxRecvDataSegmentLength", &bytes)
            .key("MaxBurstLength", &bytes)
            .key("FirstBurstLength", &bytes)
    }

    /// Initiators must prove that they are this user.
    #[must_use]
    pub fn chap(mut self, user: &str, secret: &str) -> Self {
        self.incoming = Some(Account::new(user, secret));
        self
    }

    /// The target proves that it is this user, to initiators that ask. It takes those that don't ask, too.
    #[must_use]
    pub fn mutual(mut self, user: &str, secret: &str) -> Self {
        self.outgoing = Some(Account::new(user, secret));
        self
    }
}

impl Lun {
    /// A writable logical unit with blocks of 512 bytes and a write cache, that takes UNMAP.
    pub fn new(bytes: u64) -> Self {
        Self {
            bytes,
            block_bytes: 512,
            image: None,
            is_read_only: false,
            has_write_cache: true,
            is_thin: true,
        }
    }

    /// One whose bytes are in a file that is there already.
    ///
    /// # Errors
    ///
    /// When it isn't.
    pub fn of(image: &Path) -> Outcome<Self> {
        let bytes = std::fs::metadata(image)?.len();
        Ok(Self {
            image: Some(image.to_owned()),
            ..Self::new(bytes)
        })
    }

    /// With blocks of so many bytes.
    #[must_use]
    pub fn block_bytes(mut self, bytes: u32) -> Self {
        self.block_bytes = bytes;
        self
    }

    /// Write-protected.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.is_read_only = true;
        self
    }

    /// Reports that it has no write cache (WCE clear). What tgtd does with a write is the same.
    #[must_use]
    pub fn without_write_cache(mut self) -> Self {
        self.has_write_cache = false;
        self
    }

    /// Without UNMAP.
    #[must_use]
    pub fn thick(mut self) -> Self {
        self.is_thin = false;
        self
    }
}

impl Account {
    fn new(user: &str, secret: &str) -> Self {
        Self {
            user: user.to_owned(),
            secret: secret.to_owned(),
        }
    }
}
