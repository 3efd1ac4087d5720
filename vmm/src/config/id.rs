//! Names: of a device in the API, and of the instance.

/// Longest name of a device, in bytes. The guest sees the first 20 of a drive's as its serial number.
pub const DEVICE_ID_BYTES_MAX: usize = 64;

/// Longest name of an instance, in bytes.
pub const INSTANCE_ID_BYTES_MAX: usize = 64;

/// Checks the name of a device, which is a part of a path of the API.
///
/// # Errors
///
/// What is wrong with the name, in words for whoever chose it.
pub fn check_device_id(id: &str) -> Result<(), IdError> {
    if id.is_empty() {
        return Err(IdError::Empty);
    }
    if !id.chars().all(|c| c == '_' || c.is_alphanumeric()) {
        return Err(IdError::DeviceCharacter);
    }
    if id.len() > DEVICE_ID_BYTES_MAX {
        return Err(IdError::DeviceLength { bytes: id.len() });
    }
    Ok(())
}

/// Checks the name of the instance (`--id`).
///
/// # Errors
///
/// What is wrong with the name, in words for whoever chose it.
pub fn check_instance_id(id: &str) -> Result<(), IdError> {
    if id.is_empty() || id.len() > INSTANCE_ID_BYTES_MAX {
        return Err(IdError::InstanceLength { bytes: id.len() });
    }
    match id.chars().find(|c| *c != '-' && !c.is_alphanumeric()) {
        Some(character) => Err(IdError::InstanceCharacter { character }),
        None => Ok(()),
    }
}

/// Why a name is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// No name.
    #[error("The ID cannot be empty.")]
    Empty,
    /// A character that a path of the API cannot have.
    #[error("API Resource IDs can only contain alphanumeric characters and underscores.")]
    DeviceCharacter,
    /// Name of a device too long.
    #[error("the ID has {bytes} bytes; choose one of at most {DEVICE_ID_BYTES_MAX}")]
    DeviceLength {
        /// Its length.
        bytes: usize,
    },
    /// Name of the instance empty or too long.
    #[error("invalid instance ID: it has {bytes} characters; choose one with 1 to {INSTANCE_ID_BYTES_MAX}")]
    InstanceLength {
        /// Its length.
        bytes: usize,
    },
    /// A character that the name of an instance cannot have.
    #[error("invalid instance ID: it has the character `{character}`; use letters, digits and `-`")]
    InstanceCharacter {
        /// The first such character.
        character: char,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_with_letters_digits_and_underscores() {
        assert_eq!(check_device_id("root_fs0"), Ok(()));
        assert_eq!(check_device_id(""), Err(IdError::Empty));
        for id in ["a-b", "a/b", "..", "a b", "a\0"] {
            assert_eq!(check_device_id(id), Err(IdError::DeviceCharacter), "{id:?}");
        }
        assert_eq!(check_device_id(&"a".repeat(64)), Ok(()));
        assert_eq!(
            check_device_id(&"a".repeat(65)),
            Err(IdError::DeviceLength { bytes: 65 })
        );
    }

    #[test]
    fn an_instance_is_named_with_letters_digits_and_dashes() {
        assert_eq!(check_instance_id("551e7604-e35c-42b3"), Ok(()));
        assert_eq!(check_instance_id(""), Err(IdError::InstanceLength { bytes: 0 }));
        assert_eq!(
            check_instance_id("a_b"),
            Err(IdError::InstanceCharacter { character: '_' })
        );
        assert_eq!(check_instance_id(&"a".repeat(64)), Ok(()));
        assert_eq!(
            check_instance_id(&"a".repeat(65)),
            Err(IdError::InstanceLength { bytes: 65 })
        );
    }
}
