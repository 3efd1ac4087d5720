#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use proptest::prelude::*;

use super::*;
use crate::iscsi::chap::Algorithm;
use crate::iscsi::digest::DigestKind;
use crate::iscsi::portal::{Host, PORT};
use crate::secret::SecretSource;

fn parsed(text: &str) -> IscsiUrl {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refused(text: &str) -> UrlError {
    match text.parse::<IscsiUrl>() {
        Ok(url) => panic!("{text} is {url}"),
        Err(error) => error,
    }
}

#[test]
fn the_least_url_names_a_host_a_target_and_a_logical_unit() {
    let url = parsed("iscsi://10.0.0.1/iqn.2026-11.org.example:disk/1");
    let host = Host::V4([10, 0, 0, 1].into());
    assert_eq!(url.portals, [Portal { host, port: PORT }]);
    assert_eq!(url.image.target.as_str(), "iqn.2026-11.org.example:disk");
    assert_eq!(url.image.lun.number(), Some(1));
    assert_eq!(url.user, None);
    assert_eq!(url.options, UrlOptions::default());
}

#[test]
fn a_url_has_one_canonical_text() {
    for (text, canonical) in [
        (
            "ISCSI://10.0.0.1:3260/IQN.2026-11.org.Example:Disk/01",
            "iscsi://10.0.0.1/iqn.2026-11.org.example:disk/1",
        ),
        (
            "iscsi://A.example,[2001:DB8::1]:3261/iqn.2026-11.org:d/300?",
            "iscsi://a.example,[2001:db8::1]:3261/iqn.2026-11.org:d/300",
        ),
        (
            "iscsi://vm%40x@h/iqn.2026-11.org%3Ad/0?data_digest=crc32c&header_digest=none&chap_secret_file=%2Fetc/a%26b",
            "iscsi://vm%40x@h/iqn.2026-11.org:d/0?chap_secret_file=/etc/a%26b&data_digest=crc32c",
        ),
        (
            "iscsi://vm@h/eui.02004567A425678D/2?base_immutable=false&chap_secret_fd=7",
            "iscsi://vm@h/eui.02004567a425678d/2?chap_secret_fd=7",
        ),
    ] {
        let url = parsed(text);
        assert_eq!(url.to_string(), canonical);
        assert_eq!(parsed(canonical), url);
    }
}

#[test]
fn each_option_is_taken() {
    let url = parsed(
        "iscsi://vm@h/iqn.2026-11.org:d/1?chap_secret_fd=5&chap=sha256&mutual_user=disk&mutual_secret_file=/s\
         &header_digest=crc32c&data_digest=crc32c&initiator=iqn.2026-11.org:VM&base_immutable=true",
    );
    let expected = UrlOptions {
        chap_secret: Some(SecretSource::Descriptor(5)),
        chap: Some(Algorithm::Sha256),
        mutual: Some(Mutual {
            user: "disk".to_owned(),
            secret: SecretSource::File("/s".into()),
        }),
        header_digest: DigestKind::Crc32c,
        data_digest: DigestKind::Crc32c,
        initiator: Some("iqn.2026-11.org:vm".parse().unwrap()),
        base_immutable: true,
    };
    assert_eq!(url.user.as_deref(), Some("vm"));
    assert_eq!(url.options, expected);
}

#[test]
fn an_image_is_one_whatever_the_way_to_it() {
    let one = parsed("iscsi://a/iqn.2026-11.org:D/1");
    let other = parsed("iscsi://vm@b,c:1/iqn.2026-11.org:d/1?chap_secret_fd=3");
    assert_eq!(one.image, other.image);
    assert_ne!(one.image, parsed("iscsi://a/iqn.2026-11.org:D/2").image);
}

#[test]
fn a_password_in_a_url_is_refused_and_not_repeated() {
    for text in [
        "iscsi://vm:hunter2@h/iqn.2026-11.org:d/1",
        "iscsi://vm:hunt/er2@h/iqn.2026-11.org:d/1",
        "iscsi://vm%hunter2@h/iqn.2026-11.org:d/1",
        "iscsi://vm%61hunter2@h/iqn.2026-11.org:d/1",
        "iscsi://vm%dehunter2@h/iqn.2026-11.org:d/1",
    ] {
        let error = refused(text);
        assert_eq!(error, UrlError::Password, "{text}");
        assert!(error.to_string().contains("chap_secret_file"), "{error}");
    }
    for text in [
        "iscsi://vm:hunter2?@h/iqn.2026-11.org:d/1",
        "iscsi://vm:hunter2#@h/iqn.2026-11.org:d/1",
        "iscsi://vm@h/iqn.2026-11.org:d/1?chap_secret=hunter2",
        "iscsi://vm@h/iqn.2026-11.org:d/1?chap_secret_fd=hunter2",
    ] {
        let error = refused(text);
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    }
}

#[test]
fn a_mistake_is_named() {
    let value = |key, expected| UrlError::Value { key, expected };
    let place = "iscsi://vm@h/iqn.2026-11.org:d/1?chap_secret_fd=3";
    for (more, error) in [
        ("&x=1", UrlError::UnknownOption("x".to_owned())),
        ("&", UrlError::UnknownOption(String::new())),
        ("&chap=sha1", value("chap", "md5 or sha256")),
        ("&header_digest=CRC32C", value("header_digest", "crc32c or none")),
        ("&base_immutable", value("base_immutable", "true or false")),
        ("&chap_secret_fd=3", UrlError::Twice("chap_secret_fd")),
        (
            "&chap_secret_file=/s",
            UrlError::Both("chap_secret_file", "chap_secret_fd"),
        ),
        ("&initiator=%zz", UrlError::Escape),
        ("#x", UrlError::Fragment),
    ] {
        assert_eq!(refused(&format!("{place}{more}")), error, "{more}");
    }
    let error = refused(&format!("{place}&x=1")).to_string();
    assert!(KEYS_ARE_LISTED.iter().all(|key| error.contains(key)), "{error}");
    for (text, error) in [
        ("nfs://h/iqn.2026-11.org:d/1", UrlError::Scheme),
        ("iscsi://h", UrlError::Path),
        ("iscsi://h/iqn.2026-11.org:d", UrlError::Path),
        (
            "iscsi://h/iqn.2026-11.org:d/16384",
            UrlError::Lun("16384".to_owned()),
        ),
        ("iscsi://h/iqn.2026-11.org:d/+1", UrlError::Lun("+1".to_owned())),
        ("iscsi://@h/iqn.2026-11.org:d/1", UrlError::User),
    ] {
        assert_eq!(refused(text), error, "{text}");
    }
    assert!(matches!(
        refused("iscsi:///iqn.2026-11.org:d/1"),
        UrlError::Portal(_)
    ));
    assert!(matches!(
        refused("iscsi://h,/iqn.2026-11.org:d/1"),
        UrlError::Portal(_)
    ));
    assert!(matches!(refused("iscsi://h/disk/1"), UrlError::Target(_)));
    let many = "h,".repeat(PORTALS_MAX) + "h";
    assert_eq!(
        refused(&format!("iscsi://{many}/iqn.2026-11.org:d/1")),
        UrlError::Portals
    );
    assert_eq!(
        refused(&format!("iscsi://{}", "a".repeat(URL_BYTES_MAX))),
        UrlError::Long
    );
}

const KEYS_ARE_LISTED: [&str; 3] = ["chap_secret_file", "mutual_user", "base_immutable"];

#[test]
fn options_that_need_each_other_come_together() {
    for (text, words) in [
        ("iscsi://vm@h/iqn.2026-11.org:d/1", "chap_secret_file"),
        ("iscsi://h/iqn.2026-11.org:d/1?chap_secret_fd=3", "USER@HOST"),
        ("iscsi://h/iqn.2026-11.org:d/1?chap=md5", "USER@HOST"),
        (
            "iscsi://h/iqn.2026-11.org:d/1?mutual_user=d&mutual_secret_fd=3",
            "USER@HOST",
        ),
        (
            "iscsi://vm@h/iqn.2026-11.org:d/1?chap_secret_fd=3&mutual_user=d",
            "mutual_secret_file",
        ),
        (
            "iscsi://vm@h/iqn.2026-11.org:d/1?chap_secret_fd=3&mutual_secret_fd=4",
            "mutual_user",
        ),
    ] {
        let error = refused(text);
        assert!(matches!(error, UrlError::Incomplete { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn a_path_is_no_url() {
    assert!(IscsiUrl::is_url("iSCSI://h"));
    for path in ["/var/iscsi://", "iscsi:/", "", "iscsi:/é"] {
        assert!(!IscsiUrl::is_url(path), "{path}");
    }
}

#[test]
fn a_text_that_is_no_url_is_shown_without_what_could_be_a_password() {
    let good = "iscsi://vm@h,i:7/iqn.2026-11.org:d/1?chap_secret_file=/s";
    assert_eq!(shown(good), good);
    for (text, expected) in [
        (
            "iscsi://vm:hush@h/iqn.2026-11.org:d/1",
            "iscsi://…@h/iqn.2026-11.org:d/1",
        ),
        (
            "iscsi://vm:hu/sh@h/iqn.2026-11.org:d/1",
            "iscsi://…@h/iqn.2026-11.org:d/1",
        ),
        ("iscsi://vm:hu?sh@h/iqn.2026-11.org:d/1", "iscsi://…"),
        (
            "iscsi://vm@h/iqn.2026-11.org:d/1?secret=hush",
            "iscsi://…@h/iqn.2026-11.org:d/1?…",
        ),
        ("iscsi://h/iqn.2026-11.org:d/1?secret=h@sh", "iscsi://…"),
        ("iSCSI://h/iqn.2026-11.org:d/x", "iscsi://h/iqn.2026-11.org:d/x"),
        ("iscsi://", "iscsi://"),
    ] {
        assert_eq!(shown(text), expected, "{text}");
    }
}

proptest! {
    #[test]
    fn what_is_read_is_written_as_it_reads(
        text in concat!(
            "iscsi://([a-z%:]{1,6}@)?[a-z0-9.:\\[\\],]{1,12}/iqn\\.2026-11\\.[a-z:%4_A]{1,8}/[0-9]{1,5}",
            "(\\?(chap_secret_f[de]|chap|initiator|data_digest|x)=[a-z0-9%/&=]{0,8})?",
        ),
    ) {
        if let Ok(url) = text.parse::<IscsiUrl>() {
            prop_assert_eq!(url.to_string().parse(), Ok(url));
        }
    }

    #[test]
    fn a_user_and_a_path_may_have_any_character(user in "\\PC{1,20}", path in "/\\PC{1,20}") {
        let url = IscsiUrl {
            user: Some(user),
            options: UrlOptions {
                chap_secret: Some(SecretSource::File(path.into())),
                ..UrlOptions::default()
            },
            ..parsed("iscsi://h/iqn.2026-11.org:d/1")
        };
        prop_assert_eq!(url.to_string().parse(), Ok(url));
    }
}
