//! The attributes of files (RFC 8881, 5; RFC 7862, 12.2): those that are asked for or set here.

use super::{FileHandle, Status, Time};
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_enum, xdr_struct};

/// Words of a [`Bitmap`] that are kept: 128 attributes, where the standards have 83.
const WORDS: usize = 4;
/// Most words that are read.
const WORDS_MAX: usize = 16;

/// `bitmap4`: a set of attributes, or of operations. What is beyond 128 is not kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bitmap([u32; WORDS]);

impl Bitmap {
    /// The empty set.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// The set of those numbers, of which each is less than 128.
    pub fn of(numbers: &[u32]) -> Self {
        numbers.iter().fold(Self::EMPTY, |set, number| set.with(*number))
    }

    /// The set with one number more. 128 and more are not kept.
    #[must_use]
    pub fn with(mut self, number: u32) -> Self {
        if let Some(word) = self.word_of(number) {
            *word |= 1 << (number % 32);
        }
        self
    }

    /// Whether the number is in the set.
    pub fn has(mut self, number: u32) -> bool {
        self.word_of(number)
            .is_some_and(|word| *word & 1 << (number % 32) != 0)
    }

    /// Whether nothing is.
    pub fn is_empty(self) -> bool {
        self == Self::EMPTY
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        let mut both = self;
        for (word, other) in both.0.iter_mut().zip(other.0) {
            *word &= other;
        }
        both
    }

    fn word_of(&mut self, number: u32) -> Option<&mut u32> {
        self.0.get_mut(usize::try_from(number / 32).ok()?)
    }
}

impl Xdr for Bitmap {
    fn put(&self, writer: &mut Writer) {
        let len = self.0.iter().rposition(|word| *word != 0).map_or(0, |at| at + 1);
        writer.array(self.0.get(..len).expect("it is a position in it"));
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let mut words = [0; WORDS];
        for at in 0..reader.len(WORDS_MAX)? {
            let word = reader.u32()?;
            if let Some(kept) = words.get_mut(at) {
                *kept = word;
            }
        }
        Ok(Self(words))
    }
}

/// The one table of attributes: a row is a constant, its number, and a field of [`Attributes`].
macro_rules! attributes {
    ($($(#[$doc:meta])* $constant:ident = $number:literal, $field:ident: $type:ty;)*) => {
        /// The numbers of attributes, for a [`Bitmap`].
        pub mod number {
            $($(#[$doc])* pub const $constant: u32 = $number;)*
        }

        /// `fattr4`: those attributes that are there.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Attributes {
            $($(#[$doc])* pub $field: Option<$type>,)*
        }

        impl Attributes {
            /// All that there can be.
            pub const KNOWN: &'static [u32] = &[$($number,)*];

            /// Which there are.
            pub fn set(&self) -> Bitmap {
                let mut set = Bitmap::EMPTY;
                $(if self.$field.is_some() {
                    set = set.with($number);
                })*
                set
            }

            /// Those of them that are in `wanted`.
            #[must_use]
            pub fn only(mut self, wanted: Bitmap) -> Self {
                $(self.$field = self.$field.filter(|_| wanted.has($number));)*
                self
            }

            fn put_values(&self, writer: &mut Writer) {
                $(if let Some(value) = &self.$field {
                    value.put(writer);
                })*
            }

            fn read_values(set: Bitmap, reader: &mut Reader<'_>) -> Result<Self, XdrError> {
                Ok(Self {
                    $($field: set.has($number).then(|| Xdr::read(reader)).transpose()?,)*
                })
            }
        }
    };
}

attributes! {
    /// Which attributes the file has.
    SUPPORTED_ATTRS = 0, supported_attrs: Bitmap;
    /// What kind of file it is.
    TYPE = 1, file_type: FileType;
    /// `FH4_…`: whether handles hold for ever (0).
    FH_EXPIRE_TYPE = 2, fh_expire_type: u32;
    /// Another number each time the file is changed.
    CHANGE = 3, change: u64;
    /// Length, in bytes.
    SIZE = 4, size: u64;
    /// Which file system it is in.
    FSID = 8, fsid: Fsid;
    /// How long the server keeps what a client holds, in seconds.
    LEASE_TIME = 10, lease_time: u32;
    /// Why an entry of a directory has no attributes.
    RDATTR_ERROR = 11, rdattr_error: Status;
    /// The handle.
    FILEHANDLE = 19, filehandle: FileHandle;
    /// Which file of its file system it is.
    FILEID = 20, fileid: u64;
    /// Length of the longest file, in bytes.
    MAXFILESIZE = 27, maxfilesize: u64;
    /// Most data of a READ, in bytes.
    MAXREAD = 30, maxread: u64;
    /// Most data of a WRITE, in bytes.
    MAXWRITE = 31, maxwrite: u64;
    /// Permission bits.
    MODE = 33, mode: u32;
    /// Whose it is.
    OWNER = 36, owner: OwnerName;
    /// Whose group's it is.
    OWNER_GROUP = 37, owner_group: OwnerName;
    /// Room that this user could still fill, in bytes.
    SPACE_AVAIL = 42, space_avail: u64;
    /// Room that is free, in bytes.
    SPACE_FREE = 43, space_free: u64;
    /// Room of the whole file system, in bytes.
    SPACE_TOTAL = 44, space_total: u64;
    /// Room that the file takes, in bytes.
    SPACE_USED = 45, space_used: u64;
    /// When its attributes changed.
    TIME_METADATA = 52, time_metadata: Time;
    /// When its bytes changed.
    TIME_MODIFY = 53, time_modify: Time;
    /// Which file it is where something is mounted on it.
    MOUNTED_ON_FILEID = 55, mounted_on_fileid: u64;
    /// Which attributes an exclusive create can set.
    SUPPATTR_EXCLCREAT = 75, suppattr_exclcreat: Bitmap;
    /// What the offsets of a CLONE are multiples of, in bytes.
    CLONE_BLKSIZE = 77, clone_blksize: u32;
}

/// Longest values of all attributes of a file, in bytes.
const VALUES_BYTES_MAX: usize = 8192;

impl Xdr for Attributes {
    fn put(&self, writer: &mut Writer) {
        self.set().put(writer);
        let values = writer.reserve();
        self.put_values(writer);
        let values_bytes = writer.bytes_behind(&values);
        writer.fill(
            values,
            u32::try_from(values_bytes).expect("each of them has a bound"),
        );
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let set = Bitmap::read(reader)?;
        // Where one is not known, those behind it cannot be found.
        if let Some(unknown) = (0..128).find(|number| set.has(*number) && !Self::KNOWN.contains(number)) {
            return Err(XdrError::Value {
                field: "attrmask",
                value: unknown,
            });
        }
        let mut values = Reader::new(reader.opaque(VALUES_BYTES_MAX)?);
        let attributes = Self::read_values(set, &mut values)?;
        values.end()?;
        Ok(attributes)
    }
}

xdr_enum! {
    /// `nfs_ftype4`.
    pub enum FileType("nfs_ftype4") {
        /// A file with bytes.
        Regular = 1,
        /// A directory.
        Directory = 2,
        /// A block device.
        Block = 3,
        /// A character device.
        Character = 4,
        /// A symbolic link.
        Link = 5,
        /// A socket.
        Socket = 6,
        /// A pipe.
        Fifo = 7,
        /// The directory of a file's named attributes.
        AttributeDirectory = 8,
        /// A named attribute.
        NamedAttribute = 9,
    }
}

xdr_struct! {
    /// `fsid4`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Fsid {
        /// The first half.
        pub major: u64,
        /// And the second.
        pub minor: u64,
    }
}

/// The name of a user or a group, as the server writes it (5.9).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerName(pub Vec<u8>);

const OWNER_NAME_BYTES_MAX: usize = 1024;

impl Xdr for OwnerName {
    fn put(&self, writer: &mut Writer) {
        writer.opaque(&self.0);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self(reader.opaque(OWNER_NAME_BYTES_MAX)?.to_vec()))
    }
}
