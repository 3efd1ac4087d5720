//! `--pmem`: a file of the host as persistent memory of the guest.

use std::str::FromStr;

use serde_json::{Value, json};
use thiserror::Error;

use super::disk::split_at_commas;

/// Such a file as it is written on the command line: `PATH[,OPTION]…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PmemSpec {
    path: String,
    id: Option<String>,
    is_read_only: bool,
    is_root: bool,
}

/// Why a text is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum PmemError {
    #[error("the persistent memory has no file: write PATH[,OPTION]…")]
    NoPath,
    #[error("unknown option {0:?} of persistent memory: there are id=ID, ro and root")]
    Option(String),
    #[error("two files of persistent memory have the id {0}: choose another by id=ID")]
    SameId(String),
}

impl FromStr for PmemSpec {
    type Err = PmemError;

    fn from_str(text: &str) -> Result<Self, PmemError> {
        let mut parts = split_at_commas(text).into_iter();
        let path = parts.next().filter(|path| !path.is_empty());
        let mut pmem = Self {
            path: path.ok_or(PmemError::NoPath)?,
            id: None,
            is_read_only: false,
            is_root: false,
        };
        for option in parts {
            match option.split_once('=') {
                None if option == "ro" => pmem.is_read_only = true,
                None if option == "root" => pmem.is_root = true,
                Some(("id", id)) if !id.is_empty() => pmem.id = Some(id.to_owned()),
                _ => return Err(PmemError::Option(option)),
            }
        }
        Ok(pmem)
    }
}

impl PmemSpec {
    /// Whether the kernel is to find its root there.
    pub(super) fn is_root(&self) -> bool {
        self.is_root
    }
}

/// The id and the configuration of each; one may be the root if that is nothing else.
///
/// # Errors
///
/// When two have the same id.
pub(super) fn configs(pmems: &[PmemSpec], may_be_root: bool) -> Result<Vec<(String, Value)>, PmemError> {
    let mut configs: Vec<(String, Value)> = Vec::with_capacity(pmems.len());
    for (index, pmem) in pmems.iter().enumerate() {
        let id = pmem.id.clone().unwrap_or_else(|| format!("pmem{index}"));
        if configs.iter().any(|(earlier, _)| *earlier == id) {
            return Err(PmemError::SameId(id));
        }
        let config = json!({
            "id": id,
            "path_on_host": pmem.path,
            "root_device": pmem.is_root && may_be_root,
            "read_only": pmem.is_read_only,
        });
        configs.push((id, config));
    }
    Ok(configs)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn of(texts: &[&str]) -> Result<Vec<(String, Value)>, PmemError> {
        let pmems: Result<Vec<PmemSpec>, _> = texts.iter().map(|text| text.parse()).collect();
        configs(&pmems?, true)
    }

    #[test]
    fn persistent_memory_is_a_path_and_options() {
        let all = of(&["a,,1.img", "b.img,ro,root,id=b"]).unwrap();
        let ids: Vec<&str> = all.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids, ["pmem0", "b"]);
        let path = all.first().and_then(|(_, config)| config.get("path_on_host"));
        assert_eq!(path, Some(&json!("a,1.img")));
        for (index, (_, config)) in all.into_iter().enumerate() {
            for is_so in ["read_only", "root_device"] {
                assert_eq!(config.get(is_so), Some(&json!(index == 1)));
            }
        }
    }

    #[test]
    fn what_is_none_is_an_error_that_says_what_there_is() {
        let refused = |texts: &[&str]| of(texts).unwrap_err().to_string();
        assert!(refused(&[""]).contains("PATH"));
        assert!(refused(&["a,rw"]).contains("id=ID, ro and root"));
        assert!(refused(&["a,id=x", "b,id=x"]).contains("two files"));
    }
}
