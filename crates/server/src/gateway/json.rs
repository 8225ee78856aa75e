//! Messages as JSON and back, by the rules of protobuf's JSON mapping and the options that etcd sets
//! for its gateway: names as in the .proto files, fields at their default left out, unknown ones
//! ignored. It knows no message by itself; the descriptors say all.

use bytes::Bytes;
use prost_reflect::prost::Message;
use prost_reflect::{DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions};
use tonic::{Code, Status};

/// Reads one JSON value as this message, and gives its bytes.
///
/// # Errors
/// InvalidArgument, with the place of the fault.
pub(crate) fn to_protobuf(message: &MessageDescriptor, value: &[u8]) -> Result<Bytes, Status> {
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let mut reader = serde_json::Deserializer::from_slice(value);
    let read = DynamicMessage::deserialize_with_options(message.clone(), &mut reader, &options);
    let read = read.and_then(|message| reader.end().map(|()| message));
    let read = read.map_err(|error| Status::invalid_argument(explain(&error)))?;
    Ok(read.encode_to_vec().into())
}

/// A fault as protobuf for Go words it: the place comes first.
fn explain(error: &serde_json::Error) -> String {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    let fault = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
    format!("proto: (line {line}:{column}): {fault}")
}

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
    use super::super::routes;
    use super::*;

    /// What becomes of a request that is read and shown again.
    fn again(path: &str, text: &str) -> Result<String, String> {
        let route = routes::find(path).expect("a route");
        let bytes = to_protobuf(&route.input, text.as_bytes());
        let bytes = bytes.map_err(|status| status.message().to_owned())?;
        Ok(to_json(&route.input, bytes).expect("shown"))
    }

    #[test]
    fn names_numbers_and_bytes_are_read_in_all_their_forms() {
        for (text, expected) in [
            (r#"{"key":"YQ==","range_end":"Yg"}"#, r#"{"key":"YQ==","range_end":"Yg=="}"#),
            (r#"{"rangeEnd":"-_8="}"#, r#"{"range_end":"+/8="}"#),
            (r#"{"limit":"3","revision":4}"#, r#"{"limit":"3","revision":"4"}"#),
            (r#"{"limit":3.0,"sort_order":2}"#, r#"{"limit":"3","sort_order":"DESCEND"}"#),
            (r#"{"sort_order":"NONE","keys_only":false,"limit":0}"#, "{}"),
            (r#"{"sort_target":7,"nothing":{"x":[1]},"key":null}"#, r#"{"sort_target":7}"#),
            (r#"{"limit":"-9223372036854775808"}"#, r#"{"limit":"-9223372036854775808"}"#),
        ] {
            assert_eq!(again("kv/range", text).as_deref(), Ok(expected), "{text}");
        }
        let txn = r#"{"compare":[{"result":"NOT_EQUAL","target":"LEASE","key":"YQ==","lease":"0"}],
                     "success":[{"request_txn":{"failure":[{"requestPut":{"key":"Yg=="}}]}}]}"#;
        let shown = "{\"compare\":[{\"result\":\"NOT_EQUAL\",\"target\":\"LEASE\",\"key\":\"YQ==\",\
                     \"lease\":\"0\"}],\"success\":[{\"request_txn\":{\"failure\":[{\"request_put\":\
                     {\"key\":\"Yg==\"}}]}}]}";
        assert_eq!(again("kv/txn", txn).as_deref(), Ok(shown));
    }

    #[test]
    fn what_is_not_the_message_is_refused_with_its_place() {
        for text in [
            r#"[]"#,
            r#"null"#,
            r#""x""#,
            r#"{"key":1}"#,
            r#"{"key":"!"}"#,
            r#"{"limit":"x"}"#,
            r#"{"limit":1.5}"#,
            r#"{"limit":"9223372036854775808"}"#,
            r#"{"keys_only":"true"}"#,
        ] {
            let fault = again("kv/range", text).expect_err(text);
            assert!(fault.starts_with("proto: (line 1:"), "{fault}");
        }
        let both = r#"{"create_request":{},"cancel_request":{}}"#;
        assert!(again("watch", both).is_err(), "one of two");
    }

    #[test]
    fn errors_and_lines() {
        let status = Status::not_found("no \"x\"");
        assert_eq!(of_status(&status), r#"{"code":5,"message":"no \"x\""}"#);
        assert_eq!(of_status(&Status::unknown("")), r#"{"code":2}"#);
        assert_eq!(
            line("result", r#"{"a":"<b>&c"}"#),
            "{\"result\":{\"a\":\"\\u003cb\\u003e\\u0026c\"}}\n"
        );
    }
}
