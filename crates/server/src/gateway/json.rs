//! Messages and errors as JSON, by the rules of protobuf's JSON mapping and the options that etcd sets
//! for its gateway: names as in the .proto files, fields at their default left out, no spaces. It
//! knows no message by itself; the descriptors say all. The way back is in `read`.

use bytes::Bytes;
use prost_reflect::{DynamicMessage, MessageDescriptor, SerializeOptions};
use tonic::{Code, Status};

/// Shows a message of our own as JSON, without spaces.
///
/// # Errors
/// Internal, if the bytes are not this message.
pub(crate) fn to_json(message: &MessageDescriptor, bytes: Bytes) -> Result<String, Status> {
    let unreadable = |error: &dyn std::error::Error| {
        tracing::error!(%error, message = message.full_name(), "an answer cannot be shown as JSON");
        Status::internal("an answer cannot be shown as JSON")
    };
    let read =
        DynamicMessage::decode(message.clone(), bytes).map_err(|error| unreadable(&error))?;
    let options = SerializeOptions::new().use_proto_field_name(true);
    let mut text = Vec::new();
    let mut writer = serde_json::Serializer::new(&mut text);
    read.serialize_with_options(&mut writer, &options).map_err(|error| unreadable(&error))?;
    String::from_utf8(text).map_err(|error| unreadable(&error))
}

/// An error as JSON: `{"code":5,"message":"..."}`, parts at their default left out.
pub(crate) fn of_status(status: &Status) -> String {
    let mut parts = Vec::new();
    if status.code() != Code::Ok {
        parts.push(format!("\"code\":{}", status.code() as i32));
    }
    if !status.message().is_empty() {
        let text = serde_json::Value::from(status.message());
        parts.push(format!("\"message\":{text}"));
    }
    format!("{{{}}}", parts.join(","))
}

/// One line of a stream: the JSON under a name, safe to stand in a web page as Go makes it.
pub(crate) fn line(name: &str, json: &str) -> String {
    let mut line = String::with_capacity(json.len() + name.len() + 6);
    line.push_str("{\"");
    line.push_str(name);
    line.push_str("\":");
    for part in json.split_inclusive(['<', '>', '&', '\u{2028}', '\u{2029}']) {
        let mut rest = part.chars();
        match rest.next_back() {
            Some(last @ ('<' | '>' | '&' | '\u{2028}' | '\u{2029}')) => {
                line.push_str(rest.as_str());
                line.push_str(&format!("\\u{:04x}", u32::from(last)));
            }
            _ => line.push_str(part),
        }
    }
    line.push_str("}\n");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_and_lines() {
        let status = Status::not_found("no \"x\"");
        assert_eq!(of_status(&status), r#"{"code":5,"message":"no \"x\""}"#);
        assert_eq!(of_status(&Status::unknown("")), r#"{"code":2}"#);
        let shown = "{\"result\":{\"a\":\"\\u003cb\\u003e\\u0026c\"}}\n";
        assert_eq!(line("result", r#"{"a":"<b>&c"}"#), shown);
        assert_eq!(line("error", "{}"), "{\"error\":{}}\n");
    }
}
