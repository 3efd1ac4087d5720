#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use proptest::prelude::*;

use super::*;

fn parsed(text: &str) -> NfsUrl {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refused(text: &str) -> UrlError {
    match text.parse::<NfsUrl>() {
        Ok(url) => panic!("{text} is {url}"),
        Err(error) => error,
    }
}

#[test]
fn the_least_url_names_a_host_and_a_path() {
    let url = parsed("nfs://10.0.0.1/export/vm/root.raw");
    assert_eq!(url.image.host, Host::V4([10, 0, 0, 1].into()));
    assert_eq!(url.image.port, None);
    assert_eq!(url.image.path.to_string(), "/export/vm/root.raw");
    assert_eq!(url.options, UrlOptions::default());
    let (file, directories) = url.image.path.file_and_directories();
    assert_eq!((file.bytes(), directories.len()), (&b"root.raw"[..], 2));
    let beside = url.image.path.beside(Name::new("root.raw.lease.1").unwrap());
    assert_eq!(beside.to_string(), "/export/vm/root.raw.lease.1");
}

#[test]
fn a_url_has_one_canonical_text() {
    for (text, canonical) in [
        (
            "NFS://Filer.Example:2049/a%2db/c.raw?",
            "nfs://filer.example/a-b/c.raw",
        ),
        ("nfs://[2001:DB8::1]:2050/a%20b", "nfs://[2001:db8::1]:2050/a%20b"),
        (
            "nfs://h:2049/e/i?version=3&mountport=20048",
            "nfs://h:2049/e/i?version=3&mountport=20048",
        ),
        (
            "nfs://h/i?base_immutable=false&groups=4,5&gid=02&uid=1&version=4.2&uncommitted_bytes_max=1048576",
            "nfs://h/i?version=4.2&uid=1&gid=2&groups=4,5&uncommitted_bytes_max=1048576",
        ),
    ] {
        let url = parsed(text);
        assert_eq!(url.to_string(), canonical);
        assert_eq!(parsed(canonical), url);
    }
}

#[test]
fn each_option_is_taken() {
    let url = parsed("nfs://h/i?version=3&uid=4294967295&gid=0&groups=&mountport=1&base_immutable=true");
    let options = UrlOptions {
        version: Some(Version::V3),
        uid: Some(u32::MAX),
        gid: Some(0),
        groups: Some(Vec::new()),
        mount_port: Some(1),
        uncommitted_bytes_max: None,
        base_immutable: true,
    };
    assert_eq!(url.options, options);
    assert_eq!(
        parsed("nfs://h/i?version=4.1").options.version,
        Some(Version::V41)
    );
}

#[test]
fn what_is_no_url_is_refused_for_its_reason() {
    for (text, error) in [
        ("iscsi://h/i", UrlError::Scheme),
        ("nfs://h", UrlError::Path),
        ("nfs://u@h/i", UrlError::User),
        ("nfs://h/i#x", UrlError::Fragment),
        ("nfs://h/", UrlError::Component),
        ("nfs://h/a//b", UrlError::Component),
        ("nfs://h/a/../b", UrlError::Component),
        ("nfs://h/a/%2e%2E/b", UrlError::Component),
        ("nfs://h/a%2fb", UrlError::Component),
        ("nfs://h/a%zz", UrlError::Escape),
        ("nfs://h/a%00", UrlError::Escape),
        ("nfs://h:0/a", UrlError::Host("h:0".to_owned())),
        ("nfs:///a", UrlError::Host(String::new())),
        ("nfs://h/i?x=1", UrlError::UnknownOption("x".to_owned())),
        ("nfs://h/i?uid=1&uid=1", UrlError::Twice("uid")),
        ("nfs://h/i?mountport=1", UrlError::MountPort),
        ("nfs://h/i?mountport=1&version=4.1", UrlError::MountPort),
    ] {
        assert_eq!(refused(text), error, "{text}");
    }
    assert_eq!(
        refused(&format!("nfs://h{}", "/a".repeat(COMPONENTS_MAX + 1))),
        UrlError::Deep
    );
    assert_eq!(
        refused(&format!("nfs://{}", "a".repeat(URL_BYTES_MAX))),
        UrlError::Long
    );
    let error = refused("nfs://h/i?x=1").to_string();
    assert!(option::KEYS.iter().all(|key| error.contains(key)), "{error}");
}

#[test]
fn a_value_that_an_option_cannot_have_is_refused() {
    for query in [
        "version=4",
        "version=2",
        "uid=-1",
        "uid=+1",
        "uid=",
        "gid=4294967296",
        "groups=1,,2",
        "groups=1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17",
        "mountport=0",
        "uncommitted_bytes_max=0",
        "base_immutable",
    ] {
        let (key, _) = query.split_once('=').unwrap_or((query, ""));
        let error = refused(&format!("nfs://h/i?{query}"));
        assert!(
            matches!(error, UrlError::Value { key: of, .. } if of == key),
            "{query}: {error}"
        );
    }
}

#[test]
fn a_path_is_no_url() {
    assert!(NfsUrl::is_url("nFs://h"));
    for path in ["/var/nfs://", "nfs:/", "", "nfs:/é"] {
        assert!(!NfsUrl::is_url(path), "{path}");
    }
}

proptest! {
    #[test]
    fn what_is_read_is_written_as_it_reads(
        text in concat!(
            "nfs://[a-z0-9.:\\[\\]]{1,12}(/[a-z%.é]{1,6}){1,3}",
            "(\\?(version|uid|gid|groups|mountport|x)=[0-9.,%&=]{0,8})?",
        ),
    ) {
        if let Ok(url) = text.parse::<NfsUrl>() {
            prop_assert_eq!(url.to_string().parse(), Ok(url));
        }
    }

    #[test]
    fn a_path_may_have_any_character(component in "[^/\\pC]{1,20}") {
        if let Some(name) = Name::new(component) {
            let mut url = parsed("nfs://h/i");
            url.image.path = url.image.path.beside(name);
            prop_assert_eq!(url.to_string().parse(), Ok(url));
        }
    }
}
