//! What the policy of system calls keeps to.

use std::fs;

use serde_json::Value;

use crate::tree;

#[test]
fn every_rule_and_every_argument_has_a_reason() {
    let path = tree::root().join("resources/seccomp/x86_64.json");
    let text = fs::read_to_string(&path).expect("the policy is there");
    let policy: Value = serde_json::from_str(&text).expect("it is JSON");
    let has_reason = |part: &Value| {
        part.get("comment")
            .and_then(Value::as_str)
            .is_some_and(|text| text.len() > 3)
    };
    let mut bare = Vec::new();
    let mut count = 0;
    for (kind, filter) in policy.as_object().into_iter().flatten() {
        for rule in filter
            .get("filter")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let arguments = rule.get("args").and_then(Value::as_array).into_iter().flatten();
            count += 1;
            if !has_reason(rule) || !arguments.into_iter().all(has_reason) {
                bare.push(format!("{kind}: {rule}"));
            }
        }
    }
    assert!(count > 100, "the policy has rules");
    assert!(bare.is_empty(), "say why:\n{}", bare.join("\n"));
}
