//! An OpenAPI document, and bodies that it allows and that it does not.

use std::collections::BTreeSet;

use coracle_tests::{Outcome, ensure};
use serde_json::{Map, Value, json};

/// Members within members are made so deep.
const DEPTH_MAX: usize = 4;

/// The document.
pub(super) struct Document {
    root: Value,
    pub(super) operations: Vec<Operation>,
}

/// One method of one path.
pub(super) struct Operation {
    pub(super) id: String,
    pub(super) method: String,
    pub(super) path: String,
    /// The statuses that it says.
    pub(super) statuses: BTreeSet<u16>,
    /// What comes with status 200, if that is one JSON value.
    pub(super) answer: Option<Value>,
    body: Option<Value>,
    needs_body: bool,
}

/// What a request carries.
#[derive(Clone, Debug)]
pub(super) enum Body {
    /// Nothing.
    None,
    /// What the document allows. Whether it can be done is another question.
    Fitting(Value),
    /// What it does not.
    Wrong(String),
}

impl Body {
    pub(super) fn is_wrong(&self) -> bool {
        matches!(self, Self::Wrong(_))
    }

    pub(super) fn text(&self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Fitting(value) => Some(value.to_string()),
            Self::Wrong(text) => Some(text.clone()),
        }
    }
}

impl Operation {
    /// The path with a name in it.
    pub(super) fn path_of(&self, name: &str) -> String {
        match self.path.split_once('{') {
            Some((before, _)) => format!("{before}{name}"),
            None => self.path.clone(),
        }
    }
}

impl Document {
    pub(super) fn parse(text: &str) -> Outcome<Self> {
        let root: Value = serde_json::from_str(text)?;
        let mut operations = Vec::new();
        for (path, methods) in root.get("paths").and_then(Value::as_object).into_iter().flatten() {
            for (method, operation) in methods.as_object().into_iter().flatten() {
                operations.push(Operation::parse(path, method, operation)?);
            }
        }
        ensure!(
            operations.len() > 40,
            "the document has only {} operations",
            operations.len()
        );
        Ok(Self { root, operations })
    }

    pub(super) fn operation(&self, id: &str) -> Outcome<&Operation> {
        let found = self.operations.iter().find(|operation| operation.id == id);
        Ok(found.ok_or_else(|| format!("the document has no operation {id}"))?)
    }

    /// What is sent to try an operation; `name` is in its path.
    pub(super) fn bodies(&self, operation: &Operation, name: &str) -> Vec<Body> {
        let Some(schema) = &operation.body else {
            // A PATCH without a body in the document does not look at one.
            return match operation.method.as_str() {
                "PATCH" => vec![Body::None, Body::Fitting(json!({}))],
                _ => vec![Body::None, Body::Wrong("{}".to_owned())],
            };
        };
        let mut bodies = vec![if operation.needs_body {
            Body::Wrong(String::new())
        } else {
            Body::None
        }];
        bodies.extend(["{", "nonsense", "\u{0}"].map(|text| Body::Wrong(text.to_owned())));
        let schema = self.resolve(schema);
        if schema.get("properties").is_none() {
            bodies.push(Body::Fitting(self.fitting(schema)));
            return bodies;
        }
        let named = |mut body: Value| {
            for member in ["drive_id", "iface_id", "group_id", "id"] {
                if let Some(place) = body.get_mut(member) {
                    *place = name.into();
                }
            }
            body
        };
        let least = named(self.fitting(schema));
        bodies.push(Body::Fitting(least.clone()));
        bodies.push(Body::Wrong("[]".to_owned()));
        bodies.push(Body::Wrong(
            with(&least, &["no_such_member".to_owned()], json!(1)).to_string(),
        ));
        for required in required(schema) {
            let mut body = least.clone();
            body.as_object_mut().map(|members| members.remove(&required));
            bodies.push(Body::Wrong(body.to_string()));
        }
        for member in self.members(schema, DEPTH_MAX) {
            let fitting = |value| named(self.with_parents(schema, &least, &member.path, value));
            bodies.push(Body::Fitting(fitting(self.fitting(&member.schema))));
            if let Some(other) = self.other_type(&member.schema) {
                let body = self.with_parents(schema, &least, &member.path, other);
                bodies.push(Body::Wrong(body.to_string()));
            }
        }
        bodies
    }

    /// Whether an answer is what its schema says.
    pub(super) fn check(&self, schema: &Value, value: &Value, path: &str) -> Outcome {
        let types = self.types(schema);
        ensure!(
            types.is_empty() || types.contains(type_of(value)),
            "GET {path}: {value} is none of {types:?}"
        );
        if value.is_null() {
            return Ok(());
        }
        let schema = self.resolve(schema);
        for required in required(schema) {
            ensure!(
                value.get(&required).is_some(),
                "GET {path}: no `{required}` in {value}"
            );
        }
        if let (Some(members), Some(properties)) = (value.as_object(), properties(schema)) {
            for (name, value) in members {
                let Some(property) = properties.get(name) else {
                    return Err(format!("GET {path}: `{name}` is not documented").into());
                };
                self.check(property, value, path)?;
            }
        }
        Ok(())
    }

    /// The schema itself, for a reference or one that is there or null.
    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            let found = self.root.pointer(reference.trim_start_matches('#'));
            return self.resolve(found.unwrap_or(&Value::Null));
        }
        let choices = schema.get("anyOf").and_then(Value::as_array);
        match choices.and_then(|choices| {
            choices
                .iter()
                .find(|choice| choice.get("type") != Some(&json!("null")))
        }) {
            Some(choice) => self.resolve(choice),
            None => schema,
        }
    }

    /// The JSON types that a value may have; empty if it may have any.
    fn types(&self, schema: &Value) -> BTreeSet<String> {
        if let Some(choices) = schema
            .get("anyOf")
            .or(schema.get("oneOf"))
            .and_then(Value::as_array)
        {
            return choices.iter().flat_map(|choice| self.types(choice)).collect();
        }
        if schema.get("$ref").is_some() {
            return self.types(self.resolve(schema));
        }
        match schema.get("type") {
            Some(Value::String(name)) => BTreeSet::from([name.clone()]),
            Some(Value::Array(names)) => names
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            _ => BTreeSet::new(),
        }
    }

    /// A value of a type that the schema has not.
    fn other_type(&self, schema: &Value) -> Option<Value> {
        let types = self.types(schema);
        if types.is_empty() {
            return None;
        }
        let others = [
            json!([[7]]),
            json!({ "no": "member" }),
            json!("no number"),
            json!(true),
        ];
        others.into_iter().find(|value| !types.contains(type_of(value)))
    }

    /// The smallest value that fits.
    fn fitting(&self, schema: &Value) -> Value {
        let schema = self.resolve(schema);
        if let Some(constant) = schema.get("const") {
            return constant.clone();
        }
        let choices = schema
            .get("oneOf")
            .or(schema.get("enum"))
            .and_then(Value::as_array);
        if let Some(first) = choices.and_then(|choices| choices.first()) {
            return if first.is_object() {
                self.fitting(first)
            } else {
                first.clone()
            };
        }
        let types = self.types(schema);
        let first = types
            .iter()
            .find(|name| *name != "null")
            .map_or("", String::as_str);
        match first {
            "object" => {
                let properties = properties(schema);
                let members = required(schema).into_iter().filter_map(|name| {
                    let value = self.fitting(properties?.get(&name)?);
                    Some((name, value))
                });
                Value::Object(members.collect())
            }
            "array" => json!([]),
            "string" => json!("d"),
            "boolean" => json!(false),
            "integer" | "number" => schema.get("minimum").cloned().unwrap_or(json!(1)),
            _ => json!({}),
        }
    }

    /// Every member, those of members too.
    fn members(&self, schema: &Value, depth: usize) -> Vec<Member> {
        let mut members = Vec::new();
        for (name, property) in properties(schema).into_iter().flatten() {
            members.push(Member {
                path: vec![name.clone()],
                schema: property.clone(),
            });
            if depth > 1 {
                for inner in self.members(self.resolve(property), depth - 1) {
                    let path = [vec![name.clone()], inner.path].concat();
                    members.push(Member {
                        path,
                        schema: inner.schema,
                    });
                }
            }
        }
        members
    }

    /// `body` with a member that may lie in others, which are made as small as can be.
    fn with_parents(&self, schema: &Value, body: &Value, path: &[String], value: Value) -> Value {
        let mut body = body.clone();
        let mut schema = schema.clone();
        for depth in 1..path.len() {
            let (parents, _) = path.split_at(depth);
            let last = parents.last().cloned().unwrap_or_default();
            let next = properties(&schema)
                .and_then(|members| members.get(&last))
                .cloned();
            schema = self.resolve(&next.unwrap_or_default()).clone();
            if body
                .pointer(&pointer(parents))
                .is_none_or(|found| !found.is_object())
            {
                body = with(&body, parents, self.fitting(&schema));
            }
        }
        with(&body, path, value)
    }
}

struct Member {
    path: Vec<String>,
    schema: Value,
}

impl Operation {
    fn parse(path: &str, method: &str, operation: &Value) -> Outcome<Self> {
        let text = |name: &str| {
            operation
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let body = operation.get("requestBody");
        let needs_body = body.and_then(|body| body.get("required")) == Some(&Value::Bool(true));
        let json = |part: &Value| part.pointer("/content/application~1json/schema").cloned();
        let responses = operation.get("responses").and_then(Value::as_object);
        let statuses = responses.into_iter().flatten().map(|(status, _)| status.parse());
        Ok(Self {
            id: text("operationId"),
            method: method.to_uppercase(),
            path: path.to_owned(),
            statuses: statuses.collect::<Result<_, _>>()?,
            answer: responses.and_then(|responses| json(responses.get("200")?)),
            body: body.and_then(json),
            needs_body,
        })
    }
}

fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    schema.get("properties")?.as_object()
}

fn required(schema: &Value) -> Vec<String> {
    let names = schema.get("required").and_then(Value::as_array);
    names
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

fn pointer(path: &[String]) -> String {
    path.iter().map(|part| format!("/{part}")).collect()
}

/// `body` with one member, whose parents are there.
fn with(body: &Value, path: &[String], value: Value) -> Value {
    let mut body = body.clone();
    if let Some((last, parents)) = path.split_last()
        && let Some(members) = body.pointer_mut(&pointer(parents)).and_then(Value::as_object_mut)
    {
        members.insert(last.clone(), value);
    }
    body
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}
