//! The shape of a JSON value: its keys and the kinds of its values, without the values.

use serde_json::{Map, Value, json};

/// The shape of a value: objects keep their keys, everything else becomes the name of its kind.
///
/// A list becomes the shape of its first item.
pub fn shape(value: &Value) -> Value {
    match value {
        Value::Null => json!("null"),
        Value::Bool(_) => json!("boolean"),
        Value::Number(_) => json!("number"),
        Value::String(_) => json!("string"),
        Value::Array(items) => Value::Array(items.iter().take(1).map(shape).collect()),
        Value::Object(members) => Value::Object(
            members
                .iter()
                .map(|(key, value)| (key.clone(), shape(value)))
                .collect::<Map<_, _>>(),
        ),
    }
}

/// Where `found` lacks something that `expected` has: paths of keys that are missing or of another kind.
///
/// More keys than expected are no difference: new optional fields do not break a client. `null` stands for any kind.
pub fn missing(expected: &Value, found: &Value) -> Vec<String> {
    let mut paths = Vec::new();
    compare(expected, found, "", &mut paths);
    paths
}

fn compare(expected: &Value, found: &Value, path: &str, missing: &mut Vec<String>) {
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            for (key, expected) in expected {
                let path = format!("{path}/{key}");
                match found.get(key) {
                    Some(found) => compare(expected, found, &path, missing),
                    None => missing.push(path),
                }
            }
        }
        (Value::Array(expected), Value::Array(found)) => {
            for (expected, found) in expected.iter().zip(found) {
                compare(expected, found, &format!("{path}[]"), missing);
            }
        }
        (Value::String(expected), _) if expected == "null" => {}
        (_, Value::String(found)) if found == "null" => {}
        _ if expected == found => {}
        _ => missing.push(format!("{path}: {found}, not {expected}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_key_and_another_kind_are_found_and_a_new_key_is_not() {
        let expected = shape(&json!({ "a": 1, "b": { "c": "x" }, "d": [ { "e": true } ], "f": null }));
        let found = shape(&json!({ "a": "1", "b": {}, "d": [ { "e": false, "new": 1 } ], "f": 3 }));
        assert_eq!(
            missing(&expected, &found),
            ["/a: \"string\", not \"number\"", "/b/c"]
        );
    }
}
