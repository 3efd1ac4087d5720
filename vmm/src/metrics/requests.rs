//! How often each resource of the API was asked for, and how often the request was no good.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Registry, Section};
use crate::api::http::Method;

/// Counts of the API's requests, by Firecracker's names. Shared by the thread that counts and the
/// one that reports.
#[derive(Debug, Default)]
pub struct RequestCounters {
    counts: [Counts; RESOURCES.len()],
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    fails: AtomicU64,
}

/// A line of the table of verbs, and the names of its two counts. Firecracker has no count of
/// failures of a GET.
static RESOURCES: [(Method, &str, &str, Option<&str>); 16] = [
    (Method::Get, "/", "instance_info_count", None),
    (Method::Get, "/version", "vmm_version_count", None),
    (Method::Get, "/machine-config", "machine_cfg_count", None),
    (Method::Put, "/actions", "actions_count", Some("actions_fails")),
    (
        Method::Put,
        "/boot-source",
        "boot_source_count",
        Some("boot_source_fails"),
    ),
    (
        Method::Put,
        "/drives/{drive_id}",
        "drive_count",
        Some("drive_fails"),
    ),
    (Method::Put, "/logger", "logger_count", Some("logger_fails")),
    (
        Method::Put,
        "/machine-config",
        "machine_cfg_count",
        Some("machine_cfg_fails"),
    ),
    (Method::Put, "/cpu-config", "cpu_cfg_count", Some("cpu_cfg_fails")),
    (Method::Put, "/metrics", "metrics_count", Some("metrics_fails")),
    (Method::Put, "/pmem/{id}", "pmem_count", Some("pmem_fails")),
    (Method::Patch, "/pmem/{id}", "pmem_count", Some("pmem_fails")),
    (Method::Put, "/vsock", "vsock_count", Some("vsock_fails")),
    (Method::Put, "/serial", "serial_count", Some("serial_fails")),
    (
        Method::Patch,
        "/drives/{drive_id}",
        "drive_count",
        Some("drive_fails"),
    ),
    (
        Method::Patch,
        "/machine-config",
        "machine_cfg_count",
        Some("machine_cfg_fails"),
    ),
];

impl RequestCounters {
    /// Counts a request for the line `path` of the table of verbs, and whether its body was good.
    pub fn count<V, F>(&self, method: Method, path: &str, parsed: &Result<V, F>) {
        let resource = RESOURCES
            .iter()
            .position(|(of, at, ..)| *of == method && *at == path);
        if let Some(counts) = resource.and_then(|at| self.counts.get(at)) {
            counts.requests.fetch_add(1, Ordering::Relaxed);
            counts
                .fails
                .fetch_add(u64::from(parsed.is_err()), Ordering::Relaxed);
        }
    }

    /// Adds the sections of Firecracker's that have these counts.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        for (section, method) in [
            ("get_api_requests", Method::Get),
            ("put_api_requests", Method::Put),
            ("patch_api_requests", Method::Patch),
        ] {
            let counters = Arc::clone(self);
            registry.add(section, Box::new(move |section| counters.report(method, section)));
        }
    }

    fn report(&self, method: Method, section: &mut Section) {
        let of_method = RESOURCES
            .iter()
            .zip(&self.counts)
            .filter(|((of, ..), _)| *of == method);
        for ((_, _, requests, fails), counts) in of_method {
            section.counter(requests, counts.requests.load(Ordering::Relaxed));
            if let Some(fails) = fails {
                section.counter(fails, counts.fails.load(Ordering::Relaxed));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::routes::ROUTES;

    #[test]
    fn every_count_is_of_a_line_of_the_table_of_verbs() {
        for (method, path, ..) in RESOURCES {
            assert!(
                ROUTES
                    .iter()
                    .any(|route| route.method == method && route.path == path),
                "{path}"
            );
        }
    }
}
