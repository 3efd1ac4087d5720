#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;
use crate::snapshot::disks::{OverlayState, OverlayStates};

const DIGEST: Digest = Digest {
    length_bytes: 5,
    crc32c: 6,
};

/// A drive, and what is saved of it.
struct Rig {
    drive: DriveConfig,
    generation: Option<u64>,
    is_saved: bool,
}

impl Rig {
    fn of(fields: &str) -> Self {
        let json = format!(r#"{{"drive_id": "d", "is_root_device": false, {fields}}}"#);
        Self {
            drive: serde_json::from_str(&json).unwrap(),
            generation: Some(7),
            is_saved: false,
        }
    }

    fn disk() -> Self {
        Self::of(r#""path_on_host": "/disk", "lease_at": "/l""#)
    }

    fn overlay(fields: &str) -> Self {
        Self::of(&format!(
            r#""cache_type": "Writeback", "lease_at": "/l", "overlay": {{"base": "/base", "path": "/o"{fields}}}"#
        ))
    }

    fn kept() -> Self {
        Self::overlay(r#", "keep": true"#)
    }

    fn saved(self) -> Self {
        Self {
            is_saved: true,
            ..self
        }
    }

    fn unrecorded(self) -> Self {
        Self {
            generation: None,
            ..self
        }
    }

    fn course(
        &self,
        disks: Disks,
        overlay_directory: Option<&str>,
    ) -> Result<(DriveConfig, Course), PlanError> {
        let overlay = OverlayState {
            drive_id: "d".to_owned(),
            length_bytes: DIGEST.length_bytes,
            crc32c: DIGEST.crc32c,
        };
        let states = OverlayStates(self.is_saved.then_some(overlay).into_iter().collect());
        let wanted = Wanted {
            disks,
            overlay_directory,
            saved: &SavedOverlays::beside("/s/state", states),
        };
        let mut drive = self.drive.clone();
        let state = DriveState {
            id: "d".to_owned(),
            size_bytes: 512,
            generation: self.generation,
        };
        let course = wanted.course(&mut drive, &state)?;
        Ok((drive, course))
    }

    /// It stays as it is configured.
    fn is_own(&self, disks: Disks, succession: Succession) {
        let (drive, course) = self.course(disks, None).unwrap();
        assert_eq!((&drive, course), (&self.drive, Course::Own(succession)));
    }

    /// It gets a temporary overlay over `base`.
    fn is_over(&self, disks: Disks, base: &str, from: &Source, succession: Succession) {
        for (directory, path) in [(None, MEMORY), (Some("/t/"), "/t/d.overlay")] {
            let (drive, course) = self.course(disks, directory).unwrap();
            let overlay = OverlayConfig {
                base: base.to_owned(),
                path: path.to_owned(),
                keep: false,
            };
            let expected = DriveConfig {
                path_on_host: None,
                overlay: Some(overlay),
                lease_at: None,
                ..self.drive.clone()
            };
            assert_eq!(drive, expected);
            let lease_at = Some("/l".to_owned());
            let expected = Course::Overlay {
                from: from.clone(),
                lease_at,
                succession,
            };
            assert_eq!(course, expected);
        }
    }
}

fn saved() -> Source {
    Source::Saved(PathBuf::from("/s/d.overlay"), DIGEST)
}

const ALL: [Disks; 3] = [Disks::Continue, Disks::Clone, Disks::Detached];

#[test]
fn a_disk_is_written_itself_or_lies_under_an_overlay_of_the_machine() {
    let rig = Rig::disk();
    rig.is_own(Disks::Continue, Succession::Keeps(7));
    rig.is_over(Disks::Clone, "/disk", &Source::Disk, Succession::Keeps(7));
    rig.is_over(Disks::Detached, "/disk", &Source::Disk, Succession::Raises);
}

#[test]
fn a_kept_overlay_is_written_itself_or_copied_from_the_snapshot_if_that_has_it() {
    let kept = || Source::Kept("/o".to_owned());
    let rig = Rig::kept();
    rig.is_own(Disks::Continue, Succession::Keeps(7));
    rig.is_over(Disks::Clone, "/base", &kept(), Succession::Keeps(7));
    rig.is_over(Disks::Detached, "/base", &kept(), Succession::Raises);
    let rig = Rig::kept().saved();
    rig.is_own(Disks::Continue, Succession::Keeps(7));
    // What it was then is in the snapshot, whatever it is now.
    rig.is_over(Disks::Clone, "/base", &saved(), Succession::Raises);
    rig.is_over(Disks::Detached, "/base", &saved(), Succession::Raises);
}

#[test]
fn a_temporary_overlay_comes_from_the_snapshot_or_is_gone() {
    for lock in ["", r#", "lock": "none""#] {
        let rig = Rig::of(&format!(
            r#""overlay": {{"base": "/base", "path": "memory"}}{lock}"#
        ));
        for disks in ALL {
            assert!(matches!(rig.course(disks, None), Err(PlanError::Temporary(id)) if id == "d"));
        }
    }
    let rig = Rig::overlay("").saved();
    for disks in ALL {
        let (drive, course) = rig.course(disks, Some("/t")).unwrap();
        assert_eq!(drive, rig.drive);
        let expected = Course::Overlay {
            from: saved(),
            lease_at: None,
            succession: Succession::Raises,
        };
        assert_eq!(course, expected);
    }
}

#[test]
fn a_disk_without_records_is_gone_on_with_only_where_nobody_asks_for_them() {
    for rig in [Rig::disk().unrecorded(), Rig::kept().unrecorded()] {
        for disks in [Disks::Continue, Disks::Clone] {
            assert!(matches!(rig.course(disks, None), Err(PlanError::Unrecorded(id)) if id == "d"));
        }
        assert!(rig.course(Disks::Detached, None).is_ok());
    }
    let unlocked = Rig::of(r#""path_on_host": "/disk", "lease_at": "/l", "lock": "none""#).unrecorded();
    unlocked.is_own(Disks::Continue, Succession::Raises);
    unlocked.is_over(Disks::Clone, "/disk", &Source::Disk, Succession::Raises);
}

#[test]
fn a_disk_that_is_only_read_stays_as_it_is() {
    let rig = Rig::of(r#""path_on_host": "/disk", "is_read_only": true"#).unrecorded();
    for disks in ALL {
        rig.is_own(disks, Succession::Raises);
    }
}
