//! The arguments of commands, checked against a table from which the schema is made too.

use super::wire::Refusal;
use serde_json::{Map, Value};

/// What an argument may be.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    /// Text.
    Text,
    /// A whole number that fits 64 bits with a sign.
    Integer,
    /// true or false.
    Flag,
    /// One of these words.
    Word(&'static [&'static str]),
    /// An object with these members.
    Object(&'static [Argument]),
    /// A list, looked at by the command.
    List,
}

/// One argument.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    /// As it is written.
    pub name: &'static str,
    /// What it may be.
    pub kind: Type,
    /// It has to be there.
    pub required: bool,
}

/// An argument that has to be there.
pub const fn required(name: &'static str, kind: Type) -> Argument {
    Argument { name, kind, required: true }
}

/// An argument that may be left out.
pub const fn optional(name: &'static str, kind: Type) -> Argument {
    Argument { name, kind, required: false }
}

/// Refuses what is missing, of the wrong type, or unknown, in this order.
pub fn check(table: &[Argument], given: &Map<String, Value>) -> Result<(), Refusal> {
    check_members(table, given, "")
}

fn check_members(table: &[Argument], given: &Map<String, Value>, prefix: &str) -> Result<(), Refusal> {
    for argument in table {
        let name = format!("{prefix}{}", argument.name);
        match given.get(argument.name) {
            None if argument.required => return Err(Refusal::generic(format!("Parameter '{name}' is missing"))),
            None => {}
            Some(value) => check_one(&name, argument.kind, value)?,
        }
    }
    match given.keys().find(|name| !table.iter().any(|argument| argument.name == *name)) {
        Some(name) => Err(Refusal::generic(format!("Parameter '{prefix}{name}' is unexpected"))),
        None => Ok(()),
    }
}

fn check_one(name: &str, kind: Type, value: &Value) -> Result<(), Refusal> {
    let wrong = |expected| Err(Refusal::generic(format!("Invalid parameter type for '{name}', expected: {expected}")));
    match (kind, value) {
        (Type::Text, Value::String(_)) | (Type::Flag, Value::Bool(_)) | (Type::List, Value::Array(_)) => Ok(()),
        (Type::Integer, Value::Number(number)) if number.is_i64() => Ok(()),
        (Type::Word(words), Value::String(word)) if words.contains(&word.as_str()) => Ok(()),
        (Type::Word(_), Value::String(word)) => {
            Err(Refusal::generic(format!("Parameter '{name}' does not accept value '{word}'")))
        }
        (Type::Object(members), Value::Object(given)) => check_members(members, given, &format!("{name}.")),
        (Type::Text | Type::Word(_), _) => wrong("string"),
        (Type::Integer, _) => wrong("integer"),
        (Type::Flag, _) => wrong("boolean"),
        (Type::List, _) => wrong("array"),
        (Type::Object(_), _) => wrong("object"),
    }
}

/// A text that has been checked to be one.
pub fn text<'a>(given: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    given.get(name).and_then(Value::as_str)
}

/// A flag that has been checked to be one.
pub fn flag(given: &Map<String, Value>, name: &str) -> Option<bool> {
    given.get(name).and_then(Value::as_bool)
}

/// `speed`, 0 without one. Negative ones are refused.
pub fn speed(given: &Map<String, Value>) -> Result<Option<u64>, Refusal> {
    let Some(speed) = given.get("speed").and_then(Value::as_i64) else { return Ok(None) };
    let speed = u64::try_from(speed)
        .map_err(|_| Refusal::generic("Parameter 'speed' expects a non-negative value".to_owned()))?;
    Ok((speed > 0).then_some(speed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TABLE: &[Argument] = &[
        required("device", Type::Text),
        optional("speed", Type::Integer),
        optional("mode", Type::Word(&["existing"])),
        optional("x-perf", Type::Object(&[optional("max-workers", Type::Integer)])),
    ];

    #[test]
    fn errors_are_qemus() {
        for (given, expected) in [
            (json!({}), "Parameter 'device' is missing"),
            (json!({"device": 5}), "Invalid parameter type for 'device', expected: string"),
            (json!({"device": "d", "speed": "1"}), "Invalid parameter type for 'speed', expected: integer"),
            (json!({"device": "d", "speed": 1.5}), "Invalid parameter type for 'speed', expected: integer"),
            (json!({"device": "d", "speed": u64::MAX}), "Invalid parameter type for 'speed', expected: integer"),
            (json!({"device": "d", "mode": "x"}), "Parameter 'mode' does not accept value 'x'"),
            (json!({"device": "d", "foo": 1}), "Parameter 'foo' is unexpected"),
            (json!({"device": "d", "x-perf": {"zz": 3}}), "Parameter 'x-perf.zz' is unexpected"),
            (
                json!({"device": "d", "x-perf": {"max-workers": "0"}}),
                "Invalid parameter type for 'x-perf.max-workers', expected: integer",
            ),
        ] {
            let refusal = check(TABLE, given.as_object().unwrap()).unwrap_err();
            assert_eq!(refusal, Refusal::generic(expected), "{given}");
        }
        check(TABLE, json!({"device": "d", "mode": "existing", "speed": 7}).as_object().unwrap()).unwrap();
    }

    #[test]
    fn a_speed_is_not_negative_and_zero_is_none() {
        let of = |speed: i64| self::speed(json!({"speed": speed}).as_object().unwrap());
        assert_eq!((of(0), of(7)), (Ok(None), Ok(Some(7))));
        assert_eq!(of(-1).unwrap_err().text, "Parameter 'speed' expects a non-negative value");
    }
}
