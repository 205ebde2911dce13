//! The commands: one table for their arguments, for query-commands and for query-qmp-schema.

use super::arguments::{Argument, Type, optional, required};
use serde_json::{Value, json};

const ON_ERROR: Type = Type::Word(&["report", "ignore", "enospc", "stop", "auto"]);
const ID: &[Argument] = &[required("id", Type::Text)];
const DEVICE: &[Argument] = &[required("device", Type::Text)];
const NONE: &[Argument] = &[];

/// Of drive-backup.
pub const BACKUP: &[Argument] = &[
    required("device", Type::Text),
    required("target", Type::Text),
    optional("sync", Type::Word(&["top", "full", "none", "incremental", "bitmap"])),
    optional("job-id", Type::Text),
    optional("format", Type::Text),
    optional("mode", Type::Word(&["existing", "absolute-paths"])),
    optional("speed", Type::Integer),
    optional("bitmap", Type::Text),
    optional("bitmap-mode", Type::Word(&["on-success", "never", "always"])),
    optional("compress", Type::Flag),
    optional("on-source-error", ON_ERROR),
    optional("on-target-error", ON_ERROR),
    optional("on-cbw-error", Type::Word(&["break-guest-write", "break-snapshot"])),
    optional("auto-finalize", Type::Flag),
    optional("auto-dismiss", Type::Flag),
    optional("filter-node-name", Type::Text),
    optional("discard-source", Type::Flag),
    optional(
        "x-perf",
        Type::Object(&[
            optional("use-copy-range", Type::Flag),
            optional("max-workers", Type::Integer),
            optional("max-chunk", Type::Integer),
            optional("min-cluster-size", Type::Integer),
        ]),
    ),
];

/// Every command with its arguments; the second flag: only where disks are served.
pub const COMMANDS: &[(&str, &[Argument], bool)] = &[
    ("block-job-cancel", &[required("device", Type::Text), optional("force", Type::Flag)], false),
    ("block-job-complete", DEVICE, false),
    ("block-job-dismiss", ID, false),
    ("block-job-finalize", ID, false),
    ("block-job-pause", DEVICE, false),
    ("block-job-resume", DEVICE, false),
    ("block-job-set-speed", &[required("device", Type::Text), required("speed", Type::Integer)], false),
    ("drive-backup", BACKUP, true),
    ("job-cancel", ID, false),
    ("job-complete", ID, false),
    ("job-dismiss", ID, false),
    ("job-finalize", ID, false),
    ("job-pause", ID, false),
    ("job-resume", ID, false),
    ("qmp_capabilities", &[optional("enable", Type::List)], false),
    ("query-block", NONE, false),
    ("query-block-jobs", NONE, false),
    ("query-commands", NONE, false),
    ("query-jobs", NONE, false),
    ("query-qmp-schema", NONE, false),
    ("query-version", NONE, false),
    ("quit", NONE, false),
    (
        "transaction",
        &[
            required("actions", Type::List),
            optional(
                "properties",
                Type::Object(&[optional("completion-mode", Type::Word(&["individual", "grouped"]))]),
            ),
        ],
        true,
    ),
];

const EVENTS: &[&str] = &[
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_ERROR",
    "BLOCK_JOB_PENDING",
    "JOB_STATUS_CHANGE",
    "SHUTDOWN",
];

/// The commands of a process that serves disks, or not.
pub fn commands(serves: bool) -> impl Iterator<Item = &'static (&'static str, &'static [Argument], bool)> {
    COMMANDS.iter().filter(move |(_, _, served_only)| serves || !served_only)
}

/// QEMU's SchemaInfo list: commands with their arguments, events, and the types of both. Answers are of type `any`.
pub fn schema(serves: bool) -> Value {
    let mut list = vec![
        json!({"name": "any", "meta-type": "builtin", "json-type": "value"}),
        json!({"name": "str", "meta-type": "builtin", "json-type": "string"}),
        json!({"name": "int", "meta-type": "builtin", "json-type": "int"}),
        json!({"name": "bool", "meta-type": "builtin", "json-type": "boolean"}),
        json!({"name": "[any]", "meta-type": "array", "element-type": "any"}),
        json!({"name": "0", "meta-type": "object", "members": []}),
    ];
    for (name, arguments, _) in commands(serves) {
        let arguments = object(&mut list, arguments);
        list.push(json!({"name": name, "meta-type": "command", "arg-type": arguments, "ret-type": "any"}));
    }
    list.extend(EVENTS.iter().map(|name| json!({"name": name, "meta-type": "event", "arg-type": "0"})));
    list.into()
}

/// Adds the type and what it is made of; its name.
fn object(list: &mut Vec<Value>, members: &[Argument]) -> String {
    if members.is_empty() {
        return "0".to_owned();
    }
    let member = |argument: &Argument| {
        let kind = match argument.kind {
            Type::Text => "str".to_owned(),
            Type::Integer => "int".to_owned(),
            Type::Flag => "bool".to_owned(),
            Type::List => "[any]".to_owned(),
            Type::Object(members) => object(list, members),
            Type::Word(words) => {
                let name = list.len().to_string();
                let members: Vec<Value> = words.iter().map(|word| json!({"name": word})).collect();
                list.push(json!({"name": name, "meta-type": "enum", "members": members, "values": words}));
                name
            }
        };
        let mut member = json!({"name": argument.name, "type": kind});
        if !argument.required {
            member["default"] = Value::Null;
        }
        member
    };
    let members: Vec<Value> = members.iter().map(member).collect();
    let name = list.len().to_string();
    list.push(json!({"name": name, "meta-type": "object", "members": members}));
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_of_the_schema_is_in_it_once() {
        let schema = schema(true);
        let list = schema.as_array().unwrap();
        let names: Vec<&str> = list.iter().map(|entry| entry["name"].as_str().unwrap()).collect();
        for entry in list {
            let members = entry["members"].as_array().map(Vec::as_slice).unwrap_or_default();
            let used = members.iter().map(|member| &member["type"]).chain([&entry["arg-type"], &entry["ret-type"]]);
            for name in used.filter_map(Value::as_str) {
                assert_eq!(names.iter().filter(|other| **other == name).count(), 1, "{name}");
            }
        }
        assert!(names.contains(&"drive-backup") && names.contains(&"BLOCK_JOB_COMPLETED"));
        assert!(commands(false).all(|(name, ..)| *name != "drive-backup"));
    }
}
