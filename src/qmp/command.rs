//! What each command does.

use super::arguments::{self, text};
use super::schema;
use super::server::Shared;
use super::wire::{self, Answer, Class, Refusal};
use crate::ground::life::Verb;
use serde_json::{Map, Value, json};

/// A request as it came.
pub struct Request {
    /// To be sent back.
    pub id: Option<Value>,
    /// What to do, or what is wrong with it.
    pub command: Result<(String, Map<String, Value>), Refusal>,
}

impl Request {
    /// Of one JSON value.
    pub fn parse(bytes: &[u8]) -> Self {
        let refuse = |text: String| Self { id: None, command: Err(Refusal::generic(text)) };
        let mut object = match serde_json::from_slice(bytes) {
            Ok(Value::Object(object)) => object,
            Ok(_) => return refuse("QMP input must be a JSON object".to_owned()),
            Err(error) => return refuse(format!("JSON parse error, {error}")),
        };
        let id = object.remove("id");
        Self { id, command: Self::command(object).map_err(Refusal::generic) }
    }

    fn command(mut object: Map<String, Value>) -> Result<(String, Map<String, Value>), String> {
        let arguments = object.remove("arguments");
        let name = object.remove("execute");
        if let Some(other) = object.keys().next() {
            return Err(format!("QMP input member '{other}' is unexpected"));
        }
        let name = match name {
            None => return Err("QMP input lacks member 'execute'".to_owned()),
            Some(Value::String(name)) => name,
            Some(_) => return Err("QMP input member 'execute' must be a string".to_owned()),
        };
        match arguments {
            None => Ok((name, Map::new())),
            Some(Value::Object(arguments)) => Ok((name, arguments)),
            Some(_) => Err("QMP input member 'arguments' must be an object".to_owned()),
        }
    }
}

/// Does it. `negotiated` is the client's own.
pub fn execute(shared: &Shared, name: &str, given: &Map<String, Value>, negotiated: &mut bool) -> Answer {
    let not_found = |text: String| Err(Refusal::of(Class::CommandNotFound, text));
    let Some((_, table, _)) = schema::commands(shared.serves()).find(|(command, ..)| *command == name) else {
        return not_found(format!("The command {name} has not been found"));
    };
    match (name == "qmp_capabilities", *negotiated) {
        (false, false) => {
            return not_found("Expecting capabilities negotiation with 'qmp_capabilities'".to_owned());
        }
        (true, true) => {
            return not_found("Capabilities negotiation is already complete, command ignored".to_owned());
        }
        _ => arguments::check(table, given)?,
    }
    match name {
        "qmp_capabilities" => {
            if let Some(capability) = given.get("enable").and_then(|list| list.get(0)) {
                return Err(Refusal::generic(format!("Capability {capability} is not available")));
            }
            *negotiated = true;
            done()
        }
        "query-version" => Ok(wire::version()),
        "query-commands" => {
            Ok(schema::commands(shared.serves()).map(|(name, ..)| json!({"name": name})).collect::<Vec<_>>().into())
        }
        "query-qmp-schema" => Ok(schema::schema(shared.serves())),
        "query-block" => Ok(shared.query_block()),
        "query-block-jobs" => Ok(shared.jobs.shown().iter().map(|entry| entry.block_job()).collect::<Vec<_>>().into()),
        "query-jobs" => Ok(shared.jobs.shown().iter().map(|entry| entry.job()).collect::<Vec<_>>().into()),
        // Once it is answered: the end comes at any time from then on.
        "quit" => done(),
        "drive-backup" => shared.drive_backup(given),
        "transaction" => shared.transaction(given),
        _ => verb(shared, name, given),
    }
}

fn done() -> Answer {
    Ok(json!({}))
}

/// block-job-* and job-*.
fn verb(shared: &Shared, name: &str, given: &Map<String, Value>) -> Answer {
    let id = text(given, "device").or(text(given, "id")).unwrap_or_default();
    let jobs = &shared.jobs;
    let (entry, word) = match name.strip_prefix("block-job-") {
        Some(word) => (jobs.block_job(id)?, word),
        None => (jobs.job(id)?, name.strip_prefix("job-").unwrap_or_default()),
    };
    let is_block_job = name.starts_with("block-");
    match word {
        "cancel" => {
            let force = !is_block_job || arguments::flag(given, "force") == Some(true);
            if !force && entry.block_job()["paused"] == true {
                let text = format!("The block job for device '{id}' is currently paused");
                return Err(Refusal::generic(text));
            }
            jobs.verb(&entry, Verb::Cancel)?;
        }
        "set-speed" => {
            entry.allow(Verb::SetSpeed)?;
            entry.new.job.set_speed(arguments::speed(given)?);
        }
        "pause" => jobs.verb(&entry, Verb::Pause)?,
        "resume" => jobs.verb(&entry, Verb::Resume)?,
        "complete" => jobs.verb(&entry, Verb::Complete)?,
        "finalize" => jobs.verb(&entry, Verb::Finalize)?,
        _ => jobs.verb(&entry, Verb::Dismiss)?,
    }
    done()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_request_is_refused_as_qemu_does() {
        for (text, expected) in [
            ("{}", "QMP input lacks member 'execute'"),
            ("[]", "QMP input must be a JSON object"),
            ("5", "QMP input must be a JSON object"),
            ("{\"execute\":1}", "QMP input member 'execute' must be a string"),
            ("{\"execute\":\"x\",\"foo\":1}", "QMP input member 'foo' is unexpected"),
            ("{\"execute\":\"x\",\"arguments\":[]}", "QMP input member 'arguments' must be an object"),
        ] {
            assert_eq!(Request::parse(text.as_bytes()).command.unwrap_err(), Refusal::generic(expected));
        }
        for text in ["nonsense", "{\"execute\":\"a\" \"b\"}", "1e999", "\"\0\"", "}", "{\"a\":1e400}"] {
            let refusal = Request::parse(text.as_bytes()).command.unwrap_err();
            assert!(refusal.text.starts_with("JSON parse error, "), "{text}: {}", refusal.text);
        }
        assert!(Request::parse(b"\"\xff\"").command.is_err());
        let request = Request::parse(b"{\"execute\":\"x\",\"id\":{\"a\":[1]}}");
        assert_eq!((request.id, request.command), (Some(json!({"a": [1]})), Ok(("x".to_owned(), Map::new()))));
    }
}
