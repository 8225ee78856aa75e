//! The commands that replace a member whose data are damaged or gone, with its own id, name, addresses
//! and certificates put in. It only writes them down: whether a member is given up is the operator's
//! decision. Called once, when a member cannot start.

use std::borrow::Cow;

use kelson_raft::StartError;

use crate::config::Config;

/// What to run to replace this member, for a shell with `ENDPOINTS` set to client URLs of the members
/// that are left; `None` if replacing it would not help, or if it is the only one.
pub(crate) fn commands(config: &Config, error: &StartError) -> Option<String> {
    let alone = config.initial_cluster.split(',').count() < 2;
    let joins = config.initial_cluster_state == "existing"
        || !config.discovery_srv.is_empty()
        || !config.discovery_token.is_empty();
    if !error.is_loss() || (alone && !joins) {
        return None;
    }
    let mut etcdctl = "etcdctl --endpoints=$ENDPOINTS".to_owned();
    let tls = &config.client_tls;
    let files = [
        ("cacert", &tls.trusted_ca_file, true),
        ("cert", &tls.cert_file, tls.client_cert_auth),
        ("key", &tls.key_file, tls.client_cert_auth),
    ];
    for (flag, file, wanted) in files {
        if wanted && !file.is_empty() {
            etcdctl += &format!(" --{flag}={}", quoted(file));
        }
    }
    // A directory that has forgotten even who it was: the list of members knows, by the name.
    let id = match error.member() {
        Some(id) => format!("{id:x}"),
        None => {
            let column = format!(", {}, ", config.name);
            format!("$({etcdctl} member list | grep -F {} | cut -d, -f1)", quoted(&column))
        }
    };
    let member_dir = std::path::Path::new(&config.data_dir).join("member");
    let aside = if member_dir.exists() {
        let member_dir = member_dir.display().to_string();
        format!("mv {} {} && ", quoted(&member_dir), quoted(&format!("{member_dir}.damaged")))
    } else {
        String::new()
    };
    let urls: Vec<String> =
        config.initial_advertise_peer_urls.iter().map(ToString::to_string).collect();
    let (name, urls) = (quoted(&config.name), urls.join(","));
    Some(format!(
        "{etcdctl} member remove {id} && {aside}{etcdctl} member add {name} --peer-urls={}",
        quoted(&urls)
    ))
}

/// A word that a shell takes as it is.
fn quoted(word: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+[]".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => Cow::Borrowed(word),
        false => Cow::Owned(format!("'{}'", word.replace('\'', r"'\''"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_only_where_a_shell_needs_it() {
        for (word, expected) in
            [("https://[::1]:2380", "https://[::1]:2380"), ("a b", "'a b'"), ("", "''")]
        {
            assert_eq!(quoted(word), expected);
        }
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn certificates_and_an_id_that_is_known_are_put_in() {
        let mut config = Config {
            name: "m1".into(),
            initial_cluster: "m1=https://10.0.0.1:2380,m2=https://10.0.0.2:2380".into(),
            data_dir: "/nowhere".into(),
            ..Config::default()
        };
        config.client_tls.trusted_ca_file = "/pki/ca.crt".into();
        config.client_tls.cert_file = "/pki/server.crt".into();
        config.client_tls.key_file = "/pki/server.key".into();
        config.client_tls.client_cert_auth = true;
        let text = commands(&config, &StartError::AlreadyBootstrapped(0xab)).expect("commands");
        let etcdctl = "etcdctl --endpoints=$ENDPOINTS --cacert=/pki/ca.crt --cert=/pki/server.crt \
                       --key=/pki/server.key";
        assert!(text.starts_with(&format!("{etcdctl} member remove ab && {etcdctl} ")), "{text}");
        assert!(commands(&config, &StartError::Removed(1)).is_none(), "no loss");
        config.initial_cluster = "m1=https://10.0.0.1:2380".into();
        assert!(commands(&config, &StartError::AlreadyBootstrapped(0xab)).is_none(), "alone");
    }
}
