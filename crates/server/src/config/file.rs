//! The config file: YAML (JSON is a part of it), keys named as the flags, with four nested
//! blocks. Every scalar goes through the flag table as text, so file and command line cannot
//! drift apart. Unknown keys are told and ignored, as etcd ignores them.

use serde_yaml_ng::Value as Yaml;

use super::source::{Failure, Notice, SetError, Settings, file_text, is_known};

/// The nested blocks: key, and what to put before (peer) or instead of (others) an inner key.
const BLOCKS: [(&str, &str); 4] = [
    ("client-transport-security", ""),
    ("peer-transport-security", "peer-"),
    ("socket-options", "socket-"),
    ("discovery-config", "discovery-"),
];

/// Reads the file at `path` into `settings`.
///
/// # Errors
/// The file cannot be read, is no YAML mapping, or holds a value that its flag would refuse.
pub(super) fn read(path: &str, settings: &mut Settings) -> Result<(), Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::invalid(format!("cannot read config file {path}: {error}")))?;
    read_text(&text, settings)
        .map_err(|error| Failure::invalid(format!("error in config file {path}: {error}")))
}

fn read_text(text: &str, settings: &mut Settings) -> Result<(), String> {
    let document: Yaml = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    let mapping = match document {
        Yaml::Null => return Ok(()),
        Yaml::Mapping(mapping) => mapping,
        _ => return Err("the file is not a mapping of settings".to_owned()),
    };
    for (key, value) in mapping {
        let key = key.as_str().ok_or("a key is not text")?.to_owned();
        match (BLOCKS.iter().find(|(block, _)| *block == key), value) {
            (Some(_), Yaml::Null) => {}
            (Some((block, prefix)), Yaml::Mapping(inner)) => {
                for (inner_key, value) in inner {
                    let inner_key = inner_key.as_str().ok_or("a key is not text")?;
                    take(&flag_name(block, prefix, inner_key), &value, settings)
                        .map_err(|error| format!("{block}: {error}"))?;
                }
            }
            (Some((block, _)), _) => return Err(format!("{block} is not a mapping")),
            (None, value) => take(&key, &value, settings)?,
        }
    }
    Ok(())
}

/// The flag that an inner key stands for.
fn flag_name(block: &str, prefix: &str, key: &str) -> String {
    match (block, key) {
        ("client-transport-security", "allowed-cn" | "allowed-hostname") => {
            format!("client-cert-{key}")
        }
        ("peer-transport-security", "allowed-cn" | "allowed-hostname") => {
            format!("peer-cert-{key}")
        }
        _ if key.starts_with(prefix) => key.to_owned(),
        _ => format!("{prefix}{key}"),
    }
}

fn take(name: &str, value: &Yaml, settings: &mut Settings) -> Result<(), String> {
    // etcd knows this flag on the command line only; its sample file has a value that is refused there.
    if !is_known(name) || name == "discovery-fallback" {
        settings.notices.push(Notice::unknown_key(name));
        return Ok(());
    }
    let Some(text) = scalar_or_list(value).map_err(|error| format!("{name}: {error}"))? else {
        return Ok(());
    };
    let text = file_text(name, text);
    match settings.set(name, &text) {
        Ok(()) => Ok(()),
        Err(SetError::Unknown) => Err(format!("unknown key {name}")),
        Err(SetError::Value(error)) => Err(format!("invalid value \"{text}\" for {name}: {error}")),
        Err(SetError::Conflict(error)) => Err(error),
    }
}

/// The text of a value; `None` for an absent one. Lists are joined by commas as a flag would be.
fn scalar_or_list(value: &Yaml) -> Result<Option<String>, String> {
    Ok(Some(match value {
        Yaml::Null => return Ok(None),
        Yaml::Bool(value) => value.to_string(),
        Yaml::Number(value) => value.to_string(),
        Yaml::String(value) => value.clone(),
        Yaml::Sequence(items) => {
            let items = items.iter().map(scalar_or_list).collect::<Result<Vec<_>, _>>()?;
            items.into_iter().flatten().collect::<Vec<_>>().join(",")
        }
        Yaml::Mapping(_) | Yaml::Tagged(_) => return Err("not a plain value".to_owned()),
    }))
}
