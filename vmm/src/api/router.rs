//! From a request to a verb, through the table.

use super::http::{Method, Request};
use super::routes::{BODY_IS_OPTIONAL, ROUTES, Route};
use super::verbs::{Fault, Verb};
use crate::config::check_device_id;
use crate::metrics::RequestCounters;

/// The verb that `request` asks for, counted in `counters`.
///
/// # Errors
///
/// What is wrong with the request, in Firecracker's words where clients may know them.
pub fn route(request: &Request, counters: &RequestCounters) -> Result<Verb, Fault> {
    let method = request.method;
    let path = request.path.trim_matches('/');
    match (method, request.body.is_empty()) {
        (Method::Get, false) => return Err(Fault::bad_request("GET request cannot have a body.")),
        (Method::Delete, false) => return Err(Fault::bad_request("DELETE request cannot have a body.")),
        _ => {}
    }
    let wants_body = matches!(method, Method::Put | Method::Patch)
        && !BODY_IS_OPTIONAL
            .iter()
            .any(|optional| optional.trim_matches('/') == path);
    if request.body.is_empty() && wants_body {
        return Err(Fault::bad_request(format!("Empty {} request.", method.name())));
    }
    for route in ROUTES.iter().filter(|route| route.method == method) {
        if let Some(id) = matching(route, path) {
            if route.path.ends_with('}') {
                check_device_id(id).map_err(|error| Fault::from_error(&error))?;
            }
            let parsed = (route.parse)(id, &request.body);
            counters.count(method, route.path, &parsed);
            return parsed;
        }
    }
    Err(Fault::bad_request(format!(
        "Invalid request method and/or path: {} {path}.",
        method.name()
    )))
}

/// The name in `path` if it is one of `route`; empty if the route has none, or the path lacks it.
fn matching<'a>(route: &Route, path: &'a str) -> Option<&'a str> {
    let pattern = route.path.trim_start_matches('/');
    match pattern.split_once("/{") {
        None => (pattern == path).then_some(""),
        Some((collection, _)) => match path.split_once('/') {
            None => (path == collection).then_some(""),
            Some((first, id)) => (first == collection).then_some(id),
        },
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::super::verbs::VerbKind;
    use super::*;

    fn ask(method: Method, path: &str, body: &str) -> Result<Verb, String> {
        let request = Request {
            method,
            path: path.to_owned(),
            body: body.as_bytes().to_vec(),
            keep_alive: true,
        };
        route(&request, &RequestCounters::default()).map_err(|fault| {
            assert_eq!(fault.status.code(), 400);
            fault.message
        })
    }

    /// A body for every verb of the table.
    fn example(kind: VerbKind) -> &'static str {
        match kind {
            VerbKind::PutMachineConfig => r#"{"vcpu_count": 1, "mem_size_mib": 128}"#,
            VerbKind::PatchMachineConfig => r#"{"vcpu_count": 1}"#,
            VerbKind::PutCpuConfig | VerbKind::PutEntropy | VerbKind::PutSerial | VerbKind::PutLogger => "{}",
            VerbKind::PutBootSource => r#"{"kernel_image_path": "vmlinux"}"#,
            VerbKind::PutDrive => {
                r#"{"drive_id": "a", "path_on_host": "a.img", "is_root_device": false, "is_read_only": false}"#
            }
            VerbKind::PatchDrive => r#"{"drive_id": "a", "path_on_host": "b.img"}"#,
            VerbKind::PutRateLimiterGroup | VerbKind::PatchRateLimiterGroup => r#"{"group_id": "a"}"#,
            VerbKind::PutNetworkInterface => r#"{"iface_id": "a", "host_dev_name": "tap0"}"#,
            VerbKind::PatchNetworkInterface => r#"{"iface_id": "a"}"#,
            VerbKind::PutPmem => r#"{"id": "a", "path_on_host": "p"}"#,
            VerbKind::PatchPmem => r#"{"id": "a"}"#,
            VerbKind::PutMmdsConfig => r#"{"network_interfaces": ["a"]}"#,
            VerbKind::PutMmds | VerbKind::PatchMmds => r#"["any", "JSON"]"#,
            VerbKind::PutVsock => r#"{"guest_cid": 3, "uds_path": "v"}"#,
            VerbKind::PutMemoryHotplug => r#"{"total_size_mib": 128}"#,
            VerbKind::PatchMemoryHotplug => r#"{"requested_size_mib": 2}"#,
            VerbKind::PutBalloon => r#"{"amount_mib": 1, "deflate_on_oom": true}"#,
            VerbKind::PatchBalloon => r#"{"amount_mib": 1}"#,
            VerbKind::PatchBalloonStatistics => r#"{"stats_polling_interval_s": 1}"#,
            VerbKind::StartHinting => r#"{"acknowledge_on_stop": true}"#,
            VerbKind::PutMetrics => r#"{"metrics_path": "m"}"#,
            VerbKind::FlushMetrics => r#"{"action_type": "FlushMetrics"}"#,
            VerbKind::Start => r#"{"action_type": "InstanceStart"}"#,
            VerbKind::SendCtrlAltDel => r#"{"action_type": "SendCtrlAltDel"}"#,
            VerbKind::Pause => r#"{"state": "Paused"}"#,
            VerbKind::Resume => r#"{"state": "Resumed"}"#,
            VerbKind::GetInstance
            | VerbKind::GetVersion
            | VerbKind::GetMachineConfig
            | VerbKind::GetMetrics
            | VerbKind::GetMmds
            | VerbKind::GetBalloon
            | VerbKind::GetMemoryHotplug
            | VerbKind::GetBalloonStatistics
            | VerbKind::GetHintingStatus
            | VerbKind::StopHinting
            | VerbKind::GetConfig
            | VerbKind::GetSnapshot
            | VerbKind::GetMigration
            | VerbKind::WatchMigration
            | VerbKind::CancelMigration
            | VerbKind::DeleteDrive
            | VerbKind::DeleteNetworkInterface => "",
            VerbKind::SendMigration => r#"{"to": "b:1", "tls": {"certificate": "c", "key": "k", "ca": "a"}}"#,
            VerbKind::RecoverMigration => r#"{"to": "b:1"}"#,
            VerbKind::ReceiveMigration => {
                r#"{"listen": "[::]:0", "tls": {"certificate": "c", "key": "k", "ca": "a"}}"#
            }
            VerbKind::CreateSnapshot => r#"{"snapshot_path": "s", "mem_file_path": "m"}"#,
            VerbKind::LoadSnapshot => r#"{"snapshot_path": "s", "mem_file_path": "m"}"#,
            VerbKind::CancelSnapshot => r#"{"state": "Cancelled"}"#,
        }
    }

    #[test]
    fn every_line_of_the_table_is_reached_and_becomes_its_verbs() {
        for line in ROUTES {
            let path = line
                .path
                .replace("{drive_id}", "a")
                .replace("{group_id}", "a")
                .replace("{iface_id}", "a")
                .replace("{id}", "a");
            for kind in line.kinds {
                let verb = ask(line.method, &path, example(*kind)).unwrap();
                assert_eq!(verb.kind(), *kind, "{} {path}", line.method.name());
            }
            assert_eq!(
                line.body.is_none(),
                matches!(line.method, Method::Get | Method::Delete) || path == "/balloon/hinting/stop",
                "{} {path}",
                line.method.name()
            );
        }
    }

    #[test]
    fn no_two_lines_of_the_table_mean_the_same() {
        for (at, line) in ROUTES.iter().enumerate() {
            let same = |other: &Route| other.method == line.method && other.path == line.path;
            assert_eq!(
                ROUTES.iter().position(same),
                Some(at),
                "{} {}",
                line.method.name(),
                line.path
            );
        }
    }

    #[test]
    fn every_body_with_an_unknown_duplicate_or_mistyped_field_is_refused() {
        for line in ROUTES.iter().filter(|line| line.body.is_some()) {
            let path = line
                .path
                .replace("{drive_id}", "a")
                .replace("{group_id}", "a")
                .replace("{iface_id}", "a")
                .replace("{id}", "a");
            for kind in line.kinds {
                let body = example(*kind);
                let refused = |body: &str, reason: &str| {
                    let message = ask(line.method, &path, body).unwrap_err();
                    let prefix = "An error occurred when deserializing the json body of a request: ";
                    assert!(
                        message.starts_with(prefix) && message.contains(reason),
                        "{path} {body}: {message}"
                    );
                };
                refused(&format!("{body} x"), "trailing characters");
                refused("{", "EOF");
                refused("\0", "expected value");
                // That is whatever its user says.
                if line.body == Some("MmdsContents") {
                    continue;
                }
                let separator = if body == "{}" { "" } else { ", " };
                refused(
                    &body.replacen('{', &format!("{{\"bogus\": 1{separator}"), 1),
                    "unknown field `bogus`",
                );
                refused("[]", "invalid type");
                refused("7", "invalid type");
                let Some((field, _)) = body.trim_start_matches('{').split_once([',', '}']) else {
                    panic!("{body} is an object");
                };
                if let Some((name, _)) = field.split_once(':') {
                    refused(&body.replacen('{', &format!("{{{field}, "), 1), "duplicate field");
                    refused(&format!("{{{name}: [7]}}"), "expected");
                }
            }
        }
    }

    #[test]
    fn a_run_of_hints_is_begun_and_ended_with_a_body_or_without() {
        for body in ["", "{}", r#"{"acknowledge_on_stop": true}"#] {
            let verb = ask(Method::Patch, "/balloon/hinting/start", body).unwrap();
            let Verb::StartHinting(start) = verb else {
                panic!("{verb:?}");
            };
            assert!(start.acknowledge_on_stop, "{body}");
        }
        for body in ["", "{}", "whatever"] {
            assert_eq!(
                ask(Method::Patch, "/balloon/hinting/stop", body),
                Ok(Verb::StopHinting)
            );
        }
        let nowhere = ask(Method::Patch, "/balloon/hinting/none", "").unwrap_err();
        assert_eq!(nowhere, "Empty PATCH request.");
    }

    #[test]
    fn what_firecracker_refuses_is_refused_in_its_words() {
        let drive =
            r#"{"drive_id": "b", "path_on_host": "x", "is_root_device": false, "is_read_only": false}"#;
        for (method, path, body, words) in [
            (
                Method::Get,
                "/nope",
                "",
                "Invalid request method and/or path: GET nope.",
            ),
            (
                Method::Get,
                "/version?x=1",
                "",
                "Invalid request method and/or path: GET version?x=1.",
            ),
            (
                Method::Get,
                "/vm",
                "",
                "Invalid request method and/or path: GET vm.",
            ),
            (
                Method::Put,
                "/version",
                "{}",
                "Invalid request method and/or path: PUT version.",
            ),
            (
                Method::Delete,
                "/foo",
                "",
                "Invalid request method and/or path: DELETE foo.",
            ),
            (Method::Put, "/machine-config", "", "Empty PUT request."),
            (Method::Patch, "/machine-config", "", "Empty PATCH request."),
            (Method::Patch, "/machine-config", "{}", "Empty PATCH request."),
            (Method::Get, "/", "{}", "GET request cannot have a body."),
            (Method::Put, "/drives", "{}", "The ID cannot be empty."),
            (Method::Put, "/drives/", "{}", "The ID cannot be empty."),
            (
                Method::Put,
                "/drives/a-b",
                "{}",
                "API Resource IDs can only contain alphanumeric characters and underscores.",
            ),
            (
                Method::Put,
                "/drives/a",
                drive,
                "The id from the path does not match the id from the body!",
            ),
            (
                Method::Patch,
                "/drives/a",
                r#"{"drive_id": "b"}"#,
                "The id from the path does not match the id from the body!",
            ),
        ] {
            assert_eq!(
                ask(method, path, body).unwrap_err(),
                words,
                "{} {path}",
                method.name()
            );
        }
    }
}
