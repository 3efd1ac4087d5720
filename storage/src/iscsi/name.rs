//! Names of initiators and targets (RFC 7143, 4.2.7).

use std::fmt;
use std::str::FromStr;

/// Longest name (4.2.7.2), in bytes.
pub const NAME_BYTES_MAX: usize = 223;

/// An iSCSI name: `iqn.`, `eui.` or `naa.`, in lower case, so that names that are the same compare as such.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IscsiName(String);

/// Why a text is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// None of the three ways to write one.
    #[error(
        "`{0}` is no iSCSI name: it is iqn.YYYY-MM.DOMAIN[:ANYTHING], eui. with 16 hexadecimal digits or naa. with 16 or 32"
    )]
    Format(String),
    /// A character that has no place in one.
    #[error(
        "`{name}` is no iSCSI name: it has {character:?}, and only letters, digits, `-`, `.`, `:` and `_` are allowed"
    )]
    Character {
        /// The text.
        name: String,
        /// The first such.
        character: char,
    },
    /// Too long.
    #[error("an iSCSI name has at most {NAME_BYTES_MAX} bytes, not {0}")]
    Long(usize),
}

impl IscsiName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IscsiName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.len() > NAME_BYTES_MAX {
            return Err(NameError::Long(text.len()));
        }
        // RFC 3722 folds case. What else it does to letters beyond ASCII is for a stringprep library: a name that has been
        // through it is taken as it is.
        let name = text.to_lowercase();
        // `_` is forbidden there, and yet some targets have it in their names.
        let is_allowed = |c: char| c.is_alphanumeric() || "-.:_".contains(c);
        if let Some(character) = name.chars().find(|c| !is_allowed(*c)) {
            let name = text.to_owned();
            return Err(NameError::Character { name, character });
        }
        let is_known = match name.split_once('.') {
            Some(("iqn", rest)) => is_qualified(rest),
            Some(("eui", digits)) => digits.len() == 16 && is_hexadecimal(digits),
            Some(("naa", digits)) => [16, 32].contains(&digits.len()) && is_hexadecimal(digits),
            _ => false,
        };
        if !is_known {
            return Err(NameError::Format(text.to_owned()));
        }
        // A letter may be longer in lower case.
        if name.len() > NAME_BYTES_MAX {
            return Err(NameError::Long(name.len()));
        }
        Ok(Self(name))
    }
}

impl fmt::Display for IscsiName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `YYYY-MM.DOMAIN[:ANYTHING]`.
fn is_qualified(rest: &str) -> bool {
    let Some((date, authority)) = rest.split_once('.') else {
        return false;
    };
    let Some((year, month)) = date.split_once('-') else {
        return false;
    };
    let are_digits = |text: &str| text.bytes().all(|c| c.is_ascii_digit());
    let is_month = month.len() == 2 && are_digits(month) && ("01"..="12").contains(&month);
    let domain = authority.split_once(':').map_or(authority, |(domain, _)| domain);
    year.len() == 4 && are_digits(year) && is_month && !domain.is_empty()
}

fn is_hexadecimal(digits: &str) -> bool {
    digits.bytes().all(|c| c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_whatever_its_case() {
        for (text, name) in [
            ("iqn.2026-11.org.Example:Disk-1", "iqn.2026-11.org.example:disk-1"),
            ("IQN.1992-01.com.example", "iqn.1992-01.com.example"),
            ("eui.02004567A425678D", "eui.02004567a425678d"),
            ("naa.52004567BA64678D", "naa.52004567ba64678d"),
            (
                "naa.62004567BA64678D0123456789ABCDEF",
                "naa.62004567ba64678d0123456789abcdef",
            ),
        ] {
            assert_eq!(text.parse(), Ok(IscsiName(name.to_owned())));
        }
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_reason() {
        for text in [
            "",
            "disk",
            "iqn.2026-13.org:a",
            "iqn.26-11.org:a",
            "iqn.2026-11",
            "iqn.2026-11.:a",
            "eui.12",
            "naa.xyz",
        ] {
            let error = text.parse::<IscsiName>();
            assert_eq!(error, Err(NameError::Format(text.to_owned())));
        }
        let error = "iqn.2026-11.org:a/b".parse::<IscsiName>();
        assert!(matches!(error, Err(NameError::Character { character: '/', .. })));
        let long = format!("iqn.2026-11.org:{}", "a".repeat(NAME_BYTES_MAX));
        assert_eq!(long.parse::<IscsiName>(), Err(NameError::Long(long.len())));
    }
}
