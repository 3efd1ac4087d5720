//! `--disk`: an image and what the guest may do with it.

use std::str::FromStr;

use serde_json::{Map, Value};
use thiserror::Error;

/// A disk as it is written on the command line: `PATH[,OPTION]…`, a comma in the path doubled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    path: String,
    read_only: bool,
    root: Root,
    /// Options that the API takes as they are: its field and the value.
    fields: Vec<(&'static str, &'static str)>,
    id: Option<String>,
    partuuid: Option<String>,
}

/// Whether a disk was said to be the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    Unsaid,
    Yes,
    No,
}

/// Why a text is not a disk.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum DiskError {
    #[error("the disk has no path: write PATH[,OPTION]…")]
    NoPath,
    #[error(
        "unknown disk option {0:?}: there are ro, rw, root, noroot, sync, async, unsafe, writeback, \
         id=ID and partuuid=UUID; a comma in the path is written twice"
    )]
    Option(String),
    #[error("the disks {0} and {1} are both the root: say `root` once")]
    TwoRoots(String, String),
    #[error("two disks have the id {0}: choose another by id=ID")]
    SameId(String),
}

impl FromStr for DiskSpec {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, DiskError> {
        let mut parts = split_at_commas(text).into_iter();
        let path = parts
            .next()
            .filter(|path| !path.is_empty())
            .ok_or(DiskError::NoPath)?;
        let (fields, id, partuuid) = (Vec::new(), None, None);
        let mut disk = Self {
            path,
            read_only: false,
            root: Root::Unsaid,
            fields,
            id,
            partuuid,
        };
        for option in parts {
            disk.set(&option)?;
        }
        Ok(disk)
    }
}

impl DiskSpec {
    fn set(&mut self, option: &str) -> Result<(), DiskError> {
        match option.split_once('=') {
            None => match option {
                "ro" => self.read_only = true,
                "rw" => self.read_only = false,
                "root" => self.root = Root::Yes,
                "noroot" => self.root = Root::No,
                "sync" => self.fields.push(("io_engine", "Sync")),
                "async" => self.fields.push(("io_engine", "Async")),
                "unsafe" => self.fields.push(("cache_type", "Unsafe")),
                "writeback" => self.fields.push(("cache_type", "Writeback")),
                _ => return Err(DiskError::Option(option.to_owned())),
            },
            Some(("id", id)) if !id.is_empty() => self.id = Some(id.to_owned()),
            Some(("partuuid", uuid)) if !uuid.is_empty() => self.partuuid = Some(uuid.to_owned()),
            Some(_) => return Err(DiskError::Option(option.to_owned())),
        }
        Ok(())
    }

    fn config(&self, id: &str, is_root: Root) -> Value {
        let mut config = Map::new();
        let mut set = |field: &str, value: Value| drop(config.insert(field.to_owned(), value));
        set("drive_id", id.into());
        set("path_on_host", self.path.as_str().into());
        set("is_root_device", (is_root == Root::Yes).into());
        set("is_read_only", self.read_only.into());
        self.fields
            .iter()
            .for_each(|(field, value)| set(field, (*value).into()));
        if let Some(uuid) = &self.partuuid {
            set("partuuid", uuid.as_str().into());
        }
        Value::Object(config)
    }
}

/// The id and the configuration of each disk; the first one is the root unless another is said to be, or something else is.
///
/// # Errors
///
/// When two disks are the root, or have the same id.
pub(super) fn configs(disks: &[DiskSpec], has_root: bool) -> Result<Vec<(String, Value)>, DiskError> {
    let mut said = disks.iter().filter(|disk| disk.root == Root::Yes);
    let said_root = said.next();
    if let (Some(one), Some(other)) = (said_root, said.next()) {
        return Err(DiskError::TwoRoots(one.path.clone(), other.path.clone()));
    }
    let mut configs: Vec<(String, Value)> = Vec::with_capacity(disks.len());
    for (index, disk) in disks.iter().enumerate() {
        let id = disk.id.clone().unwrap_or_else(|| format!("disk{index}"));
        if configs.iter().any(|(earlier, _)| *earlier == id) {
            return Err(DiskError::SameId(id));
        }
        let root = match (disk.root, said_root) {
            (Root::Unsaid, None) if index == 0 && !has_root => Root::Yes,
            (root, _) => root,
        };
        let config = disk.config(&id, root);
        configs.push((id, config));
    }
    Ok(configs)
}

/// Splits at single commas; two of them are one comma of a part.
pub(super) fn split_at_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.next() {
        let part = parts.last_mut().expect("there is a first part");
        match next {
            ',' if rest.next_if_eq(&',').is_some() => part.push(','),
            ',' => parts.push(String::new()),
            other => part.push(other),
        }
    }
    parts
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parsed(texts: &[&str]) -> Result<Vec<Value>, DiskError> {
        let disks: Result<Vec<DiskSpec>, DiskError> = texts.iter().map(|text| text.parse()).collect();
        Ok(configs(&disks?, false)?
            .into_iter()
            .map(|(_, config)| config)
            .collect())
    }

    fn roots(texts: &[&str]) -> Vec<bool> {
        parsed(texts)
            .unwrap()
            .iter()
            .map(|config| config["is_root_device"] == true)
            .collect()
    }

    #[test]
    fn a_path_alone_is_a_writable_root() {
        let expected = json!({
            "drive_id": "disk0", "path_on_host": "a.img", "is_root_device": true, "is_read_only": false,
        });
        assert_eq!(parsed(&["a.img"]).unwrap(), [expected]);
    }

    #[test]
    fn every_option_reaches_the_field_that_it_names() {
        let expected = json!({
            "drive_id": "data", "path_on_host": "nfs://h/a,b.img", "is_root_device": false,
            "is_read_only": true, "io_engine": "Sync", "cache_type": "Writeback", "partuuid": "7-01",
        });
        let text = "nfs://h/a,,b.img,ro,noroot,sync,writeback,id=data,partuuid=7-01";
        assert_eq!(parsed(&[text]).unwrap(), [expected]);
    }

    #[test]
    fn the_portals_and_options_of_a_url_are_part_of_the_path() {
        let text = "iscsi://vm@h,,i:7/iqn.2026-11.org:d/1?chap_secret_file=/s&base_immutable=true,ro";
        let url = "iscsi://vm@h,i:7/iqn.2026-11.org:d/1?chap_secret_file=/s&base_immutable=true";
        let expected = json!({
            "drive_id": "disk0", "path_on_host": url, "is_root_device": true, "is_read_only": true,
        });
        assert_eq!(parsed(&[text]).unwrap(), [expected]);
    }

    #[test]
    fn the_first_disk_is_the_root_unless_said_otherwise() {
        assert_eq!(roots(&["a", "b"]), [true, false]);
        assert_eq!(roots(&["a", "b,root"]), [false, true]);
        assert_eq!(roots(&["a,noroot", "b"]), [false, false]);
    }

    #[test]
    fn contradictions_are_refused() {
        assert_eq!(
            parsed(&["a,root", "b,root"]),
            Err(DiskError::TwoRoots("a".into(), "b".into()))
        );
        assert_eq!(
            parsed(&["a,id=disk1", "b"]),
            Err(DiskError::SameId("disk1".into()))
        );
    }

    #[test]
    fn what_is_not_an_option_is_named() {
        for (text, option) in [
            ("a,", ""),
            ("a,readonly", "readonly"),
            ("a,id=", "id="),
            ("a,x=1", "x=1"),
        ] {
            assert_eq!(
                text.parse::<DiskSpec>(),
                Err(DiskError::Option(option.to_owned())),
                "{text}"
            );
        }
        assert!(
            ["", ",ro"]
                .iter()
                .all(|text| text.parse::<DiskSpec>() == Err(DiskError::NoPath))
        );
    }

    proptest! {
        #[test]
        fn a_path_with_commas_survives_being_written_with_two(path in "[a-z,./ é]{1,20}") {
            let text = format!("{},ro", path.replace(',', ",,"));
            prop_assert_eq!(text.parse::<DiskSpec>().map(|disk| (disk.path, disk.read_only)), Ok((path, true)));
        }
    }
}
