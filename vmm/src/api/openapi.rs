//! The OpenAPI 3.1 document of the API, made from the table of verbs and the types of the bodies.

use std::collections::BTreeMap;

use coracle_devices::serial::SerialConfig;
use coracle_devices::virtio::balloon::{
    BalloonConfig, BalloonPatch, BalloonStatistics, HintingStart, HintingStatus, StatisticsPatch,
};
use coracle_devices::virtio::blk::{DriveConfig, PartialDrive};
use coracle_devices::virtio::mem::{MemoryHotplugConfig, MemoryHotplugSizeUpdate, MemoryHotplugStatus};
use coracle_devices::virtio::net::{NetworkInterfaceConfig, PartialNetworkInterface};
use coracle_devices::virtio::pmem::{PartialPmem, PmemConfig};
use coracle_devices::virtio::rng::EntropyConfig;
use coracle_devices::virtio::vsock::VsockConfig;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::http::Content;
use super::routes::{AnswerShape, BODY_IS_OPTIONAL, ROUTES, Route};
use super::verbs::permitted;
use crate::config::{
    BootSource, CpuConfig, FullConfig, InstanceActionInfo, InstanceInfo, LoggerConfig, MachineConfig,
    MachineConfigPatch, MetricsConfig, MigrationReceive, MigrationRecover, MigrationSend, MigrationStatus,
    MmdsConfig, MmdsContents, Phase, RateLimiterGroup, SnapshotCreate, SnapshotLoad, SnapshotPatch,
    SnapshotProgress, Version, Vm,
};

/// Command that writes the document, from the root of the repository.
pub const REGENERATE: &str = "cargo run -p coracle-vmm --example openapi > resources/openapi.json";

/// The document as text, ending with a line feed.
pub fn document() -> String {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut schemas = settings.into_generator();
    let mut paths = BTreeMap::<&str, Map<String, Value>>::new();
    for route in ROUTES {
        let method = route.method.name().to_ascii_lowercase();
        let operation = operation(route, &mut schemas);
        paths
            .entry(route.path)
            .or_default()
            .insert(method, operation.into());
    }
    schemas.subschema_for::<Error>();
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Coracle API",
            "description": "The API of one microVM, on its Unix socket. It follows Firecracker's.",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}
        },
        "paths": paths,
        "components": {"schemas": schemas.take_definitions(true)}
    });
    serde_json::to_string_pretty(&document).expect("a JSON value has a text") + "\n"
}

/// The body of every refusal.
#[derive(Serialize, JsonSchema)]
struct Error {
    /// What is wrong, and what to do.
    fault_message: String,
}

fn operation(route: &Route, schemas: &mut SchemaGenerator) -> Map<String, Value> {
    let kinds = route
        .kinds
        .iter()
        .map(|kind| format!("{kind:?}"))
        .collect::<Vec<_>>();
    let mut operation = Map::new();
    let mut put = |name: &str, value| operation.insert(name.to_owned(), value);
    put("summary", route.summary.into());
    put("description", phases(route).into());
    put("operationId", kinds.join("Or").into());
    if let Some(name) = route.body {
        let content = json!({"application/json": {"schema": schema(name, schemas)}});
        let is_required = !BODY_IS_OPTIONAL.contains(&route.path);
        put(
            "requestBody",
            json!({"required": is_required, "content": content}),
        );
    }
    if let Some((_, name)) = route.path.split_once('{') {
        let parameter = json!({
            "name": name.trim_end_matches('}'), "in": "path", "required": true,
            "description": "Its name; the same as in the body.",
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9_]+$"}
        });
        put("parameters", json!([parameter]));
    }
    let (status, success) = match route.answer {
        AnswerShape::Empty => ("204", json!({"description": "Done."})),
        AnswerShape::Json(name) => {
            let content = json!({"application/json": {"schema": schema(name, schemas)}});
            ("200", json!({"description": "Here it is.", "content": content}))
        }
        AnswerShape::Lines(name) => {
            let content = json!({Content::JsonLines.media_type(): {"schema": schema(name, schemas)}});
            (
                "200",
                json!({"description": "One in each line.", "content": content}),
            )
        }
        AnswerShape::Text(content) => {
            let content = json!({content.media_type(): {"schema": {"type": "string"}}});
            ("200", json!({"description": "Here it is.", "content": content}))
        }
    };
    let refusal = json!({
        "description": "Refused, or failed; the body says why.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    });
    put("responses", json!({status: success, "400": refusal}));
    operation
}

/// In which phases what the route can become is allowed, in words.
fn phases(route: &Route) -> String {
    let phases = |kind| {
        let allowed = Phase::ALL
            .into_iter()
            .filter(|phase| permitted(*phase, kind).is_ok());
        allowed
            .map(|phase| format!("{phase:?}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let lines = route.kinds.iter().map(|kind| match route.kinds.len() {
        1 => format!("Phases: {}.", phases(*kind)),
        _ => format!("Phases of {kind:?}: {}.", phases(*kind)),
    });
    lines.collect::<Vec<_>>().join(" ")
}

/// The schema of a type that the table of verbs names.
fn schema(name: &str, schemas: &mut SchemaGenerator) -> Schema {
    match name {
        "BalloonConfig" => schemas.subschema_for::<BalloonConfig>(),
        "BalloonPatch" => schemas.subschema_for::<BalloonPatch>(),
        "BalloonStatistics" => schemas.subschema_for::<BalloonStatistics>(),
        "HintingStart" => schemas.subschema_for::<HintingStart>(),
        "HintingStatus" => schemas.subschema_for::<HintingStatus>(),
        "StatisticsPatch" => schemas.subschema_for::<StatisticsPatch>(),
        "MemoryHotplugConfig" => schemas.subschema_for::<MemoryHotplugConfig>(),
        "MemoryHotplugSizeUpdate" => schemas.subschema_for::<MemoryHotplugSizeUpdate>(),
        "MemoryHotplugStatus" => schemas.subschema_for::<MemoryHotplugStatus>(),
        "BootSource" => schemas.subschema_for::<BootSource>(),
        "CpuConfig" => schemas.subschema_for::<CpuConfig>(),
        "DriveConfig" => schemas.subschema_for::<DriveConfig>(),
        "EntropyConfig" => schemas.subschema_for::<EntropyConfig>(),
        "FullConfig" => schemas.subschema_for::<FullConfig>(),
        "InstanceActionInfo" => schemas.subschema_for::<InstanceActionInfo>(),
        "InstanceInfo" => schemas.subschema_for::<InstanceInfo>(),
        "LoggerConfig" => schemas.subschema_for::<LoggerConfig>(),
        "MachineConfig" => schemas.subschema_for::<MachineConfig>(),
        "MachineConfigPatch" => schemas.subschema_for::<MachineConfigPatch>(),
        "MetricsConfig" => schemas.subschema_for::<MetricsConfig>(),
        "MmdsConfig" => schemas.subschema_for::<MmdsConfig>(),
        "MmdsContents" => schemas.subschema_for::<MmdsContents>(),
        "NetworkInterfaceConfig" => schemas.subschema_for::<NetworkInterfaceConfig>(),
        "PartialNetworkInterface" => schemas.subschema_for::<PartialNetworkInterface>(),
        "PartialPmem" => schemas.subschema_for::<PartialPmem>(),
        "PmemConfig" => schemas.subschema_for::<PmemConfig>(),
        "VsockConfig" => schemas.subschema_for::<VsockConfig>(),
        "PartialDrive" => schemas.subschema_for::<PartialDrive>(),
        "RateLimiterGroup" => schemas.subschema_for::<RateLimiterGroup>(),
        "SerialConfig" => schemas.subschema_for::<SerialConfig>(),
        "SnapshotCreate" => schemas.subschema_for::<SnapshotCreate>(),
        "SnapshotLoad" => schemas.subschema_for::<SnapshotLoad>(),
        "SnapshotPatch" => schemas.subschema_for::<SnapshotPatch>(),
        "MigrationReceive" => schemas.subschema_for::<MigrationReceive>(),
        "MigrationRecover" => schemas.subschema_for::<MigrationRecover>(),
        "MigrationSend" => schemas.subschema_for::<MigrationSend>(),
        "MigrationStatus" => schemas.subschema_for::<MigrationStatus>(),
        "SnapshotProgress" => schemas.subschema_for::<SnapshotProgress>(),
        "Version" => schemas.subschema_for::<Version>(),
        "Vm" => schemas.subschema_for::<Vm>(),
        other => unreachable!("the table of verbs names the type {other}, which has no schema here"),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::*;

    const COMMITTED: &str = include_str!("../../../resources/openapi.json");

    #[test]
    fn the_committed_document_is_the_generated_one() {
        assert!(
            document() == COMMITTED,
            "resources/openapi.json is out of date; run: {REGENERATE}"
        );
    }

    #[test]
    fn every_reference_of_the_document_leads_somewhere() {
        let text = document();
        let document: Value = serde_json::from_str(&text).unwrap();
        let references: Vec<&str> = text
            .split("\"$ref\": \"#")
            .skip(1)
            .filter_map(|rest| rest.split('"').next())
            .collect();
        assert!(references.len() >= ROUTES.len());
        for reference in references {
            assert!(document.pointer(reference).is_some(), "{reference}");
        }
    }

    #[test]
    fn a_schema_is_named_as_the_table_names_it() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        let schemas = document.pointer("/components/schemas").unwrap();
        for route in ROUTES {
            let answer = match route.answer {
                AnswerShape::Json(name) | AnswerShape::Lines(name) => Some(name),
                AnswerShape::Empty | AnswerShape::Text(_) => None,
            };
            for name in route.body.into_iter().chain(answer) {
                assert!(schemas.get(name).is_some(), "{name}");
            }
        }
    }
}
