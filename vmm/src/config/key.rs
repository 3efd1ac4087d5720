//! Where keys are.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use coracle_storage::secret::SecretSource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a key is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KeyPlace {
    /// In a file.
    File(PathBuf),
    /// Behind a descriptor that the monitor has inherited, by its number. What is a pipe can be read once.
    Fd(i32),
}

impl KeyPlace {
    /// The same place, for a process whose working directory may be another.
    ///
    /// # Errors
    ///
    /// When this process has no working directory.
    pub fn made_absolute(self) -> io::Result<Self> {
        match self {
            Self::File(path) => Ok(Self::File(std::path::absolute(path)?)),
            Self::Fd(_) => Ok(self),
        }
    }
}

impl From<&KeyPlace> for SecretSource {
    fn from(place: &KeyPlace) -> Self {
        match place {
            KeyPlace::File(path) => Self::File(path.clone()),
            KeyPlace::Fd(number) => Self::Descriptor(*number),
        }
    }
}

impl FromStr for KeyPlace {
    type Err = Infallible;

    /// `fd:NUMBER`, or the path of a file; one that is called so can be written with `./` before it.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let number = text.strip_prefix("fd:").and_then(|number| number.parse().ok());
        Ok(number.map_or_else(|| Self::File(text.into()), Self::Fd))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_file_or_a_descriptor() {
        for (word, json, place) in [
            ("/k", r#"{"file":"/k"}"#, KeyPlace::File("/k".into())),
            ("fd:7", r#"{"fd":7}"#, KeyPlace::Fd(7)),
        ] {
            assert_eq!(word.parse(), Ok(place.clone()));
            assert_eq!(serde_json::to_string(&place).unwrap(), json);
            assert_eq!(serde_json::from_str::<KeyPlace>(json).unwrap(), place);
        }
        let place = KeyPlace::File("k".into()).made_absolute().unwrap();
        let expected = std::env::current_dir().unwrap().join("k");
        assert_eq!(place, KeyPlace::File(expected));
        assert_eq!("fd:k".parse(), Ok(KeyPlace::File("fd:k".into())));
        assert!(serde_json::from_str::<KeyPlace>(r#"{"fd":7,"file":"/k"}"#).is_err());
    }
}
