//! Replies and events as they go over the wire.

use serde_json::{Map, Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// The class of an error, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Anything else.
    Generic,
    /// No such command, or not now.
    CommandNotFound,
    /// No such disk.
    DeviceNotFound,
    /// No such job.
    DeviceNotActive,
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub class: Class,
    /// For people.
    pub text: String,
}

impl Refusal {
    /// Of the class that says nothing.
    pub fn generic(text: impl Into<String>) -> Self {
        Self { class: Class::Generic, text: text.into() }
    }

    /// Of a class of its own.
    pub fn of(class: Class, text: impl Into<String>) -> Self {
        Self { class, text: text.into() }
    }
}

/// What a command returns.
pub type Answer = Result<Value, Refusal>;

/// One line, with its line feed.
pub fn reply(answer: Answer, id: Option<Value>) -> Vec<u8> {
    let mut object = Map::new();
    match answer {
        Ok(value) => object.insert("return".to_owned(), value),
        Err(refusal) => {
            let class = match refusal.class {
                Class::Generic => "GenericError",
                Class::CommandNotFound => "CommandNotFound",
                Class::DeviceNotFound => "DeviceNotFound",
                Class::DeviceNotActive => "DeviceNotActive",
            };
            object.insert("error".to_owned(), json!({"class": class, "desc": refusal.text}))
        }
    };
    if let Some(id) = id {
        object.insert("id".to_owned(), id);
    }
    line(&Value::Object(object))
}

/// One line, with the time.
pub fn event(name: &str, data: Value) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut event = json!({
        "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
        "event": name,
    });
    if !data.is_null() {
        event["data"] = data;
    }
    line(&event)
}

/// `{"qemu": .., "package": ..}`: the numbers are ours.
pub fn version() -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("drive-backup ", env!("CARGO_PKG_VERSION")),
    })
}

/// What a client sees first.
pub fn greeting() -> Vec<u8> {
    line(&json!({"QMP": {"version": version(), "capabilities": []}}))
}

fn line(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.extend_from_slice(b"\r\n");
    bytes
}
