//! What is written down about a lease: one small text file, which says itself what it is.
//!
//! ```text
//! coracle lease 1
//! epoch 12
//! generation 7
//! phase held
//! incarnation 0b6f…
//! vm web-1
//! host host-b
//! pid 4711
//! since 1795442025
//! crc32c 3f0a9be1
//! ```
//!
//! There is one text for each record and no other is read: what does not parse was not written by us.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use super::handover::Offer;
use super::owner::{Incarnation, NAME_BYTES_MAX, Owner, is_printable};
use super::terms::Succession;
use crate::utc::UtcSecond;

/// One step in the life of an image's lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The number of the step, and of the record's place in its chain; from 1.
    pub epoch: u64,
    /// How often the image has been about to be written by a new owner. A snapshot that remembers a
    /// smaller one has been overtaken.
    pub generation: u64,
    /// What the step was.
    pub phase: Phase,
    /// Whose step it was.
    pub owner: Owner,
    /// When.
    pub since: UtcSecond,
}

/// What a step says about the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The owner may write, as long as it has the fence.
    Held,
    /// The owner has ended properly: everybody may take it.
    Released,
    /// Somebody has declared the owner before to be dead: everybody may take it.
    Broken,
    /// The owner takes it over from the one before, who has offered it and stands still. It may not write yet.
    Taken,
    /// The owner, who had taken it over, may write. From here on the one before never will again.
    Started,
    /// The owner had offered it, and has kept it: nobody has taken it over in time.
    Cancelled,
    /// The owner had offered it, and has it back from one who had taken it over and not started.
    Reclaimed,
    /// The owner's machine goes on elsewhere with a copy: what is here is what it was when it left, and nobody takes it by
    /// mistake.
    Moved,
}

/// Longest record: far more than any has.
pub const RECORD_BYTES_MAX: usize = 1024;

/// Why something is no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not even its size fits.
    #[error("it has more than {RECORD_BYTES_MAX} bytes")]
    Long,
    /// Something else, or of a later version.
    #[error("it does not begin with `{MAGIC}`: it is no lease record, or one of a later version")]
    Magic,
    /// Damaged.
    #[error("its checksum is wrong: it was cut short, edited or damaged")]
    Checksum,
    /// A line that is not as it is written.
    #[error("its line `{0}` is missing, or says nothing that is known here")]
    Line(&'static str),
}

/// Why an owner does not take an image.
#[derive(Debug)]
pub(crate) enum NotTaken {
    Overtaken(Box<Overtaken>),
    Exhausted,
}

/// An image that is of another generation than whoever goes on with it remembers: it has been written since, or is another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overtaken {
    /// What is remembered.
    pub expected: u64,
    /// What the storage says, if anything.
    pub newest: Option<Record>,
}

impl fmt::Display for Overtaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let expected = self.expected;
        match &self.newest {
            Some(record) => write!(
                f,
                "it was of generation {expected} then, and is of {} now: written by {} since {}",
                record.generation, record.owner, record.since
            ),
            None => write!(
                f,
                "it was of generation {expected} then, and nothing says of which it is now"
            ),
        }
    }
}

const MAGIC: &str = "coracle lease 1";

impl Record {
    /// The step after `last`, made now by `owner`. `None` when no number is left.
    pub(crate) fn after(last: Option<&Self>, phase: Phase, owner: &Owner) -> Option<Self> {
        let (epoch, generation) = last.map_or((0, 0), |last| (last.epoch, last.generation));
        // What is left behind is to be gone on with by no snapshot either.
        let raised = u64::from(matches!(phase, Phase::Held | Phase::Started | Phase::Moved));
        Some(Self {
            epoch: epoch.checked_add(1)?,
            generation: generation.checked_add(raised)?,
            phase,
            owner: owner.clone(),
            since: now(),
        })
    }

    /// The step of `owner`, who goes on where `last` has ended: the generation stays, and nothing is written before it is
    /// raised by [`Self::after`]. `None` when no number is left.
    pub(crate) fn keeping(last: &Self, owner: &Owner) -> Option<Self> {
        Some(Self {
            epoch: last.epoch.checked_add(1)?,
            generation: last.generation,
            phase: Phase::Held,
            owner: owner.clone(),
            since: now(),
        })
    }

    /// What the owner of this record can offer.
    pub(crate) fn offer(&self) -> Offer {
        Offer {
            epoch: self.epoch,
            incarnation: self.owner.incarnation,
        }
    }

    /// The step by which `owner` takes an image whose newest record is `last`.
    ///
    /// # Errors
    ///
    /// When the image is of another generation than is asked for, or no number is left.
    pub(crate) fn taking(
        last: Option<&Self>,
        succession: Succession,
        owner: &Owner,
    ) -> Result<Self, NotTaken> {
        succession.check(last)?;
        let record = match (succession, last) {
            (Succession::Keeps(_), Some(last)) => Self::keeping(last, owner),
            (Succession::TakesOver(_), last) => Self::after(last, Phase::Taken, owner),
            (_, last) => Self::after(last, Phase::Held, owner),
        };
        record.ok_or(NotTaken::Exhausted)
    }

    /// The step that declares a record broken of which only the number is known.
    pub(crate) fn over_unreadable(number: u64, owner: &Owner) -> Option<Self> {
        Some(Self {
            epoch: number.checked_add(1)?,
            // Each generation has cost a step, so none is above the number.
            generation: number,
            phase: Phase::Broken,
            owner: owner.clone(),
            since: now(),
        })
    }

    /// A step of which only the number is known, to be continued by [`Self::after`]; `None` if there is no such step.
    pub(crate) fn of_step(number: u64, owner: &Owner) -> Option<Self> {
        Self::over_unreadable(number.checked_sub(1)?, owner)
    }

    /// The text of the record.
    pub fn text(&self) -> String {
        let body = format!(
            "{MAGIC}\nepoch {}\ngeneration {}\nphase {}\nincarnation {}\nvm {}\nhost {}\npid {}\nsince {}\n",
            self.epoch,
            self.generation,
            self.phase,
            self.owner.incarnation,
            self.owner.vm,
            self.owner.host,
            self.owner.pid,
            self.since.0,
        );
        let sum = crc32c::crc32c(body.as_bytes());
        format!("{body}crc32c {sum:08x}\n")
    }

    /// Reads the text of a record.
    ///
    /// # Errors
    ///
    /// Whatever is not the one text of a record.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(RecordError::Long);
        }
        let magic = bytes.strip_prefix(MAGIC.as_bytes());
        if magic.is_none_or(|rest| rest.first() != Some(&b'\n')) {
            return Err(RecordError::Magic);
        }
        let text = str::from_utf8(bytes).map_err(|_| RecordError::Checksum)?;
        let mut lines = Lines(checked(text)?.lines());
        lines.0.next();
        let record = Self {
            epoch: lines.number("epoch", 1..=u64::MAX)?,
            generation: lines.number("generation", 0..=u64::MAX)?,
            phase: lines.parsed("phase", Phase::parse)?,
            owner: Owner {
                incarnation: lines.parsed("incarnation", Incarnation::parse)?,
                vm: lines.name("vm")?,
                host: lines.name("host")?,
                pid: u32::try_from(lines.number("pid", 0..=u64::from(u32::MAX))?)
                    .expect("the range was checked"),
            },
            since: UtcSecond(lines.number("since", 0..=UtcSecond::MAX.0)?),
        };
        // Lines may end in more than one way, and a record in one only.
        match lines.0.next() {
            None if record.text() == text => Ok(record),
            _ => Err(RecordError::Line("crc32c")),
        }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "generation {}, by {} at {}",
            self.generation, self.owner, self.since
        )
    }
}

impl Phase {
    const ALL: [Self; 8] = [
        Self::Held,
        Self::Released,
        Self::Broken,
        Self::Taken,
        Self::Started,
        Self::Cancelled,
        Self::Reclaimed,
        Self::Moved,
    ];

    /// Whether the owner has the image, as far as the record goes.
    pub fn is_owned(self) -> bool {
        match self {
            Self::Held | Self::Taken | Self::Started | Self::Cancelled | Self::Reclaimed => true,
            Self::Released | Self::Broken | Self::Moved => false,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.to_string() == text)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Held => "held",
            Self::Released => "released",
            Self::Broken => "broken",
            Self::Taken => "taken",
            Self::Started => "started",
            Self::Cancelled => "cancelled",
            Self::Reclaimed => "reclaimed",
            Self::Moved => "moved",
        })
    }
}

fn now() -> UtcSecond {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UtcSecond(since.as_secs()).min(UtcSecond::MAX)
}

/// The text before its checksum, which is right.
fn checked(text: &str) -> Result<&str, RecordError> {
    let (body, sum) = text
        .strip_suffix('\n')
        .and_then(|text| text.rsplit_once('\n'))
        .ok_or(RecordError::Checksum)?;
    let body = text
        .get(..=body.len())
        .expect("a line feed stood behind the body");
    let expected = format!("crc32c {:08x}", crc32c::crc32c(body.as_bytes()));
    if sum == expected {
        Ok(body)
    } else {
        Err(RecordError::Checksum)
    }
}

/// The lines of a record that are not read yet.
struct Lines<'a>(std::str::Lines<'a>);

impl<'a> Lines<'a> {
    fn value(&mut self, name: &'static str) -> Result<&'a str, RecordError> {
        self.0
            .next()
            .and_then(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .ok_or(RecordError::Line(name))
    }

    fn parsed<T>(&mut self, name: &'static str, parse: impl Fn(&str) -> Option<T>) -> Result<T, RecordError> {
        parse(self.value(name)?).ok_or(RecordError::Line(name))
    }

    fn number(
        &mut self,
        name: &'static str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<u64, RecordError> {
        self.parsed(name, |text| {
            let number: u64 = text.parse().ok()?;
            // No sign and no zero in front: there is one way to write it.
            (range.contains(&number) && number.to_string() == text).then_some(number)
        })
    }

    fn name(&mut self, name: &'static str) -> Result<String, RecordError> {
        self.parsed(name, |text| {
            let fits = (1..=NAME_BYTES_MAX).contains(&text.len()) && text.chars().all(is_printable);
            fits.then(|| text.to_owned())
        })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use proptest::prelude::*;

    use super::*;

    fn any_record() -> impl Strategy<Value = Record> {
        let name = "[!-~ä-ü]{1,60}";
        let phase = prop::sample::select(&Phase::ALL[..]);
        let numbers = (1..=u64::MAX, any::<u64>(), any::<u32>(), 0..=UtcSecond::MAX.0);
        (numbers, phase, any::<u128>(), name, name).prop_map(|(numbers, phase, incarnation, vm, host)| {
            Record {
                epoch: numbers.0,
                generation: numbers.1,
                phase,
                owner: Owner {
                    incarnation: Incarnation::parse(&format!("{incarnation:032x}")).unwrap(),
                    vm,
                    host,
                    pid: numbers.2,
                },
                since: UtcSecond(numbers.3),
            }
        })
    }

    proptest! {
        #[test]
        fn every_record_is_read_as_it_was_written(record in any_record()) {
            prop_assert_eq!(Record::parse(record.text().as_bytes()), Ok(record));
        }

        #[test]
        fn no_record_survives_a_flipped_bit_or_a_cut(record in any_record(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut text = record.text().into_bytes();
            let at = at.index(text.len());
            prop_assert!(Record::parse(text.split_at(at).0).is_err());
            *text.get_mut(at).unwrap() ^= 1 << bit;
            prop_assert!(Record::parse(&text).is_err());
        }

        #[test]
        fn what_is_read_is_the_one_text_of_a_record(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(record) = Record::parse(&bytes) {
                prop_assert_eq!(record.text().into_bytes(), bytes);
            }
        }
    }

    #[test]
    fn the_longest_record_is_short_enough_to_be_read() {
        let owner = Owner::of_this_process(&"v".repeat(NAME_BYTES_MAX));
        let record = Record {
            epoch: u64::MAX,
            generation: u64::MAX,
            phase: Phase::Released,
            owner: Owner {
                host: "h".repeat(NAME_BYTES_MAX),
                pid: u32::MAX,
                ..owner
            },
            since: UtcSecond::MAX,
        };
        assert_eq!(Record::parse(record.text().as_bytes()), Ok(record));
        assert_eq!(
            Record::parse(&[b'x'; RECORD_BYTES_MAX + 1]),
            Err(RecordError::Long)
        );
    }

    #[test]
    fn a_checksum_does_not_make_a_record_of_nonsense() {
        let signed = |body: &str| format!("{body}crc32c {:08x}\n", crc32c::crc32c(body.as_bytes()));
        let good = Record::after(None, Phase::Held, &Owner::of_this_process("vm"))
            .unwrap()
            .text();
        let body = good.split_once("crc32c").unwrap().0;
        assert!(Record::parse(signed(body).as_bytes()).is_ok());
        for (from, to, line) in [
            ("epoch 1", "epoch 0", "epoch"),
            ("epoch 1", "epoch 01", "epoch"),
            ("epoch 1", "epoch +1", "epoch"),
            ("generation 1", "generation", "generation"),
            ("phase held", "phase stolen", "phase"),
            ("vm vm", "vm v\tm", "vm"),
            ("host ", "guest ", "host"),
            ("since ", "since 99", "since"),
        ] {
            let parsed = Record::parse(signed(&body.replace(from, to)).as_bytes());
            assert_eq!(parsed, Err(RecordError::Line(line)), "{to}");
        }
        let longer = signed(&format!("{body}more\n"));
        assert_eq!(Record::parse(longer.as_bytes()), Err(RecordError::Line("crc32c")));
        assert_eq!(Record::parse(b"coracle lease 2\n"), Err(RecordError::Magic));
    }

    #[test]
    fn the_generation_rises_when_an_image_is_taken_and_only_then() {
        let owner = Owner::of_this_process("vm");
        let taken = Record::after(None, Phase::Held, &owner).unwrap();
        assert_eq!((taken.epoch, taken.generation), (1, 1));
        let released = Record::after(Some(&taken), Phase::Released, &owner).unwrap();
        assert_eq!((released.epoch, released.generation), (2, 1));
        let again = Record::after(Some(&released), Phase::Held, &owner).unwrap();
        assert_eq!((again.epoch, again.generation), (3, 2));
        let last = Record {
            epoch: u64::MAX,
            ..again
        };
        assert_eq!(Record::after(Some(&last), Phase::Released, &owner), None);
    }
}
