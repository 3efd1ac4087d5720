//! MODE SENSE parameter data (SPC-4, 7.5; SBC-3, 6.4): write protection and the cache.

use super::parameter::{Parameter, ParameterError};

/// What MODE SENSE says of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Whether it refuses to be written (WP).
    pub is_write_protected: bool,
    /// Whether reads and writes may have the bit FUA (DPOFUA).
    pub takes_fua: bool,
    /// Its cache; `None` if the page was not sent.
    pub caching: Option<Caching>,
}

/// The caching page (SBC-3, 6.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caching {
    /// Whether a write is done when the cache has it (WCE).
    pub write_cache: bool,
    /// Whether reads may be answered from the cache (RCD is 0).
    pub read_cache: bool,
}

const CACHING: u8 = 0x08;

impl Mode {
    /// Reads what MODE SENSE (6) sends.
    ///
    /// # Errors
    ///
    /// When not even the header is there.
    pub fn parse_6(bytes: &[u8]) -> Result<Self, ParameterError> {
        let data = Parameter::new("mode parameters", bytes);
        let data = data.cut(usize::from(data.u8(0)?) + 1);
        let pages = data.rest(4 + usize::from(data.u8(3)?));
        Ok(Self::new(data.u8(2)?, pages))
    }

    /// Reads what MODE SENSE (10) sends.
    ///
    /// # Errors
    ///
    /// When not even the header is there.
    pub fn parse_10(bytes: &[u8]) -> Result<Self, ParameterError> {
        let data = Parameter::new("mode parameters", bytes);
        let data = data.cut(usize::from(data.u16(0)?) + 2);
        let pages = data.rest(8 + usize::from(data.u16(6)?));
        Ok(Self::new(data.u8(3)?, pages))
    }

    /// `parameter` is the device-specific one of the header.
    fn new(parameter: u8, pages: &[u8]) -> Self {
        const WP: u8 = 0x80;
        const DPOFUA: u8 = 0x10;
        Self {
            is_write_protected: parameter & WP != 0,
            takes_fua: parameter & DPOFUA != 0,
            caching: Pages(pages).find_map(|page| Caching::of(&page)),
        }
    }
}

impl Caching {
    fn of(page: &Page<'_>) -> Option<Self> {
        const WCE: u8 = 0x04;
        const RCD: u8 = 0x01;
        if page.code != CACHING || page.is_subpage {
            return None;
        }
        let flags = *page.parameters.first()?;
        Some(Self {
            write_cache: flags & WCE != 0,
            read_cache: flags & RCD == 0,
        })
    }
}

/// One mode page (SPC-4, 7.5.7).
struct Page<'a> {
    code: u8,
    is_subpage: bool,
    parameters: &'a [u8],
}

/// The pages; the last one may have been cut off.
struct Pages<'a>(&'a [u8]);

impl<'a> Iterator for Pages<'a> {
    type Item = Page<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        const SPF: u8 = 0x40;
        let (first, rest) = self.0.split_first()?;
        let is_subpage = first & SPF != 0;
        let (len, rest) = if is_subpage {
            let ([_, high, low], rest) = rest.split_first_chunk()?;
            (usize::from(u16::from_be_bytes([*high, *low])), rest)
        } else {
            let (len, rest) = rest.split_first()?;
            (usize::from(*len), rest)
        };
        let (parameters, rest) = rest.split_at(len.min(rest.len()));
        self.0 = rest;
        Some(Page {
            code: first & 0x3f,
            is_subpage,
            parameters,
        })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::super::bytes_of;
    use super::*;

    const CACHED: Caching = Caching {
        write_cache: true,
        read_cache: true,
    };

    #[test]
    fn the_modes_of_tgtd_are_read_from_either_command() {
        let six = bytes_of("1f001008000000000000020008121400ffff0000ffffffff8014000000000000");
        let ten = bytes_of("0022001000000008000000000000020008121400ffff0000ffffffff8014000000000000");
        let expected = Mode {
            is_write_protected: false,
            takes_fua: true,
            caching: Some(CACHED),
        };
        assert_eq!(Mode::parse_6(&six), Ok(expected));
        assert_eq!(Mode::parse_10(&ten), Ok(expected));
    }

    #[test]
    fn write_protection_is_seen_among_all_pages() {
        let all = bytes_of(
            "6900900800000000000002000000020e8080000a0000000000000000000008121400ffff0000ffffffff801400000000000\
             00a0a021000000000000002004a01001c040000000000000000000000000000000000000000000000000000001c0a08000000\
             000000000000",
        );
        let mode = Mode::parse_6(&all).unwrap();
        assert!(mode.is_write_protected);
        assert_eq!(mode.caching, Some(CACHED));
        assert!(mode.takes_fua);
    }

    #[test]
    fn the_caching_page_is_found_behind_descriptors_and_other_pages() {
        let mode = Mode::parse_10(&bytes_of("0006 00 80 0000 0000 0802 0500")).unwrap();
        assert_eq!(mode.caching, None, "the data end where they say");
        let mode = Mode::parse_10(&bytes_of(
            "0020 00 00 0000 0008 0000000000000200 4801 0004 aaaaaaaa 8102bbbb 8802 0500",
        ))
        .unwrap();
        let expected = Caching {
            write_cache: true,
            read_cache: false,
        };
        assert_eq!(mode.caching, Some(expected));
    }

    #[test]
    fn a_header_alone_has_no_cache_and_less_is_nothing() {
        let mode = Mode::parse_6(&bytes_of("03000000")).unwrap();
        assert_eq!(mode.caching, None);
        assert!(Mode::parse_6(&bytes_of("030000")).is_err());
        assert!(Mode::parse_10(&bytes_of("00060000000000")).is_err());
        // Cut off within the page.
        assert_eq!(Mode::parse_6(&bytes_of("170000000812")).unwrap().caching, None);
    }
}
