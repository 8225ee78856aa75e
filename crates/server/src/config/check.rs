//! Rules between settings, with etcd's texts. Runs after all of them are known and before any
//! file or socket is touched; the only look outside is host name resolution when two lists of
//! URLs have to be compared.

use super::source::{Failure, Settings};
use super::{Config, TlsSettings, Url, Value};
use crate::limits::AutoCompaction;

/// Longest election timeout. Source: etcd's `maxElectionMs`.
const ELECTION_TIMEOUT_MS_MAX: u64 = 50_000;

/// TLS versions by name.
const TLS_VERSIONS: [&str; 2] = ["TLS1.2", "TLS1.3"];

/// The flags that a client URL with TLS needs.
const CERT_FLAGS: &str = "--cert-file, --key-file";

/// Fills in what follows from other settings.
pub(super) fn fill_in(settings: &mut Settings) {
    let has_cluster = settings.is_set("initial-cluster");
    let config = &mut settings.config;
    if config.data_dir.is_empty() {
        config.data_dir = format!("{}.etcd", config.name);
    }
    let discovers = !config.discovery_endpoints.is_empty()
        || !config.discovery_token.is_empty()
        || !config.discovery_srv.is_empty();
    if !has_cluster && !discovers {
        let own = config.initial_advertise_peer_urls.iter();
        let own: Vec<String> = own.map(|url| format!("{}={url}", config.name)).collect();
        config.initial_cluster = own.join(",");
    }
}

/// Checks every rule.
pub(super) fn check(settings: &Settings) -> Result<(), Failure> {
    let config = &settings.config;
    if settings.is_set("listen-client-urls") && !settings.is_set("advertise-client-urls") {
        return Err(Failure::invalid(
            "--advertise-client-urls is required when --listen-client-urls is set explicitly",
        ));
    }
    let rules = [
        check_urls,
        check_times,
        check_words,
        check_cluster,
        check_client_tls,
        check_peer_tls,
        check_tls_versions,
    ];
    rules.iter().try_for_each(|rule| rule(config)).map_err(Failure::invalid)
}

fn check_urls(config: &Config) -> Result<(), String> {
    let listen = [
        &config.listen_peer_urls,
        &config.listen_client_urls,
        &config.listen_client_http_urls,
        &config.listen_metrics_urls,
    ];
    for url in listen.into_iter().flatten() {
        url.check_bindable()?;
    }
    if config.listen_peer_urls.is_empty() || config.listen_client_urls.is_empty() {
        return Err("--listen-peer-urls and --listen-client-urls must not be empty".to_owned());
    }
    for url in &config.listen_client_http_urls {
        if config.listen_client_urls.contains(url) {
            return Err(format!("{url} is in --listen-client-urls and --listen-client-http-urls"));
        }
    }
    let advertised = config.advertise_client_urls.iter().chain(&config.initial_advertise_peer_urls);
    for url in advertised {
        if url.host().is_empty() {
            return Err(format!("an advertised URL must name a host: {url}"));
        }
    }
    Ok(())
}

fn check_times(config: &Config) -> Result<(), String> {
    let (heartbeat, election) = (config.heartbeat_interval_ms, config.election_timeout_ms);
    if heartbeat == 0 {
        return Err("--heartbeat-interval must be >0 (set to 0ms)".to_owned());
    }
    if election == 0 {
        return Err("--election-timeout must be >0 (set to 0ms)".to_owned());
    }
    if heartbeat.saturating_mul(5) > election {
        return Err(format!(
            "--election-timeout[{election}ms] should be at least as 5 times as \
             --heartbeat-interval[{heartbeat}ms]"
        ));
    }
    if election > ELECTION_TIMEOUT_MS_MAX {
        return Err(format!(
            "--election-timeout[{election}ms] is too long, and should be set less than \
             {ELECTION_TIMEOUT_MS_MAX}ms"
        ));
    }
    if config.compact_hash_check_time.is_zero() {
        return Err("--compact-hash-check-time must be >0 (set to 0s)".to_owned());
    }
    Ok(())
}

/// Settings that are one of a few words or a small range.
fn check_words(config: &Config) -> Result<(), String> {
    let one_of = |flag: &str, value: &str, words: &[&str]| {
        let texts = words.join(", ");
        let is_known = words.contains(&value);
        is_known.then_some(()).ok_or(format!("unknown --{flag} \"{value}\" (one of: {texts})"))
    };
    one_of("initial-cluster-state", &config.initial_cluster_state, &["new", "existing"]).map_err(
        |_| {
            format!(
                "invalid value \"{}\" for flag -initial-cluster-state: must be one \
                              of new, existing",
                config.initial_cluster_state
            )
        },
    )?;
    one_of("discovery-fallback", &config.discovery_fallback, &["exit"])?;
    one_of("metrics", &config.metrics, &["basic", "extensive"])?;
    one_of("logger", &config.logger, &["zap"])?;
    one_of("log-format", &config.log_format, &["json", "console"])?;
    let levels = ["debug", "info", "warn", "error", "dpanic", "panic", "fatal"];
    one_of("log-level", &config.log_level, &levels)?;
    one_of("backend-bbolt-freelist-type", &config.backend_bbolt_freelist_type, &["map", "array"])?;
    if !(4..=31).contains(&config.bcrypt_cost) {
        return Err(format!("--bcrypt-cost must be 4 to 31 (set to {})", config.bcrypt_cost));
    }
    if config.log_outputs.is_empty() {
        return Err("--log-outputs must not be empty".to_owned());
    }
    if config.log_outputs.len() > 1 && config.log_outputs.iter().any(|output| output == "default") {
        return Err("multi logoutput for \"default\" is not supported yet".to_owned());
    }
    if config.feature_gates.enabled("LeaseCheckpointPersist")
        && !config.feature_gates.enabled("LeaseCheckpoint")
    {
        return Err("enabling feature gate LeaseCheckpointPersist requires enabling feature gate \
                    LeaseCheckpoint"
            .to_owned());
    }
    if config.max_txn_ops == 0 || config.max_request_bytes == 0 {
        return Err("--max-txn-ops and --max-request-bytes must be >0".to_owned());
    }
    auto_compaction(config).map(|_| ())
}

fn check_cluster(config: &Config) -> Result<(), String> {
    let sources = [
        !config.initial_cluster.is_empty(),
        !config.discovery_endpoints.is_empty() || !config.discovery_token.is_empty(),
        !config.discovery_srv.is_empty(),
    ];
    if sources.into_iter().filter(|given| *given).count() > 1 {
        return Err("multiple discovery or bootstrap flags are set. Choose one of \
                    \"initial-cluster\", \"discovery\", \"discovery-endpoints\" or \
                    \"discovery-srv\""
            .to_owned());
    }
    if config.discovery_endpoints.is_empty() != config.discovery_token.is_empty() {
        return Err("both --discovery-endpoints and --discovery-token need to be set".to_owned());
    }
    if !sources[0] {
        return Ok(());
    }
    let members = super::parse_members(&config.initial_cluster)?;
    // A member that has data takes its cluster from them.
    if config.has_data() {
        return Ok(());
    }
    config.own_peer_urls(&members).map(drop)
}

fn check_client_tls(config: &Config) -> Result<(), String> {
    let mut urls = config.listen_client_urls.clone();
    urls.extend(config.listen_client_http_urls.iter().cloned());
    check_tls(&config.client_tls, &urls, "client")?;
    match without_certificate(&config.client_tls, &config.listen_metrics_urls) {
        None => Ok(()),
        Some(url) => Err(format!(
            "client TLS key/cert ({CERT_FLAGS}) must be provided for metrics secure url {url}"
        )),
    }
}

fn check_peer_tls(config: &Config) -> Result<(), String> {
    check_tls(&config.peer_tls, &config.listen_peer_urls, "peer")
}

fn check_tls(tls: &TlsSettings, urls: &[Url], side: &str) -> Result<(), String> {
    if tls.cert_file.is_empty() != tls.key_file.is_empty() {
        return Err(format!(
            "{side} certificate and key file must both be given or both be absent"
        ));
    }
    if !tls.allowed_cn.is_empty() && !tls.allowed_hostname.is_empty() {
        return Err(format!("{side} allowed common names and host names cannot both be given"));
    }
    if tls.client_cert_auth && tls.trusted_ca_file.is_empty() && !tls.auto_tls {
        return Err(format!("{side} certificate authentication needs a trusted CA file"));
    }
    if let Some(url) = without_certificate(tls, urls) {
        let forms = if side == "peer" { "--peer-cert-file, --peer-key-file" } else { CERT_FLAGS };
        return Err(format!(
            "TLS key/cert ({forms}) must be provided for {side} url {url} with HTTPS scheme"
        ));
    }
    Ok(())
}

/// A URL that asks for TLS although there is no certificate.
fn without_certificate<'a>(tls: &TlsSettings, urls: &'a [Url]) -> Option<&'a Url> {
    let has_certificate = !tls.cert_file.is_empty() || tls.auto_tls;
    urls.iter().find(|url| url.is_tls() && !has_certificate)
}

fn check_tls_versions(config: &Config) -> Result<(), String> {
    for version in [&config.tls_min_version, &config.tls_max_version] {
        if !version.is_empty() && !TLS_VERSIONS.contains(&version.as_str()) {
            return Err(format!(
                "unexpected TLS version \"{version}\" (must be one of: TLS1.2, TLS1.3)"
            ));
        }
    }
    if config.tls_max_version == "TLS1.2" && config.tls_min_version == "TLS1.3" {
        return Err("min version (TLS1.3) is greater than max version (TLS1.2)".to_owned());
    }
    if config.tls_min_version == "TLS1.3" && !config.cipher_suites.is_empty() {
        return Err("cipher suites cannot be configured when only TLS1.3 is enabled".to_owned());
    }
    crate::tls::check_cipher_suites(&config.cipher_suites)
}

/// Parses `name=url,name=url`, keeping names in the order of their first use; a name may repeat.
///
/// # Errors
/// A part without a name or with a URL that does not parse.
pub(super) fn parse_cluster(text: &str) -> Result<Vec<(String, Vec<Url>)>, String> {
    let mut members: Vec<(String, Vec<Url>)> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (name, url) =
            part.split_once('=').ok_or(format!("incorrect format in \"{part}\": want name=url"))?;
        let (name, url) = (name.trim(), Url::parse(url.trim())?);
        match members.iter_mut().find(|(known, _)| known == name) {
            Some((_, urls)) => urls.push(url),
            None => members.push((name.to_owned(), vec![url])),
        }
    }
    for (name, urls) in &members {
        let repeated = members
            .iter()
            .any(|(other, others)| other != name && others.iter().any(|url| urls.contains(url)));
        if repeated {
            return Err(format!("initial cluster has duplicate URLs: {text}"));
        }
    }
    Ok(members)
}

/// The rule of `--auto-compaction-mode` and `--auto-compaction-retention`.
///
/// # Errors
/// An unknown mode, or a retention that is neither number nor duration.
pub(super) fn auto_compaction(config: &Config) -> Result<AutoCompaction, String> {
    let text = config.auto_compaction_retention.as_str();
    let number = if text.is_empty() { Some(0) } else { i64::parse(text).ok() };
    let error = || format!("error parsing --auto-compaction-retention \"{text}\"");
    match (config.auto_compaction_mode.as_str(), number) {
        ("periodic" | "revision", Some(0)) => Ok(AutoCompaction::Off),
        ("periodic", Some(hours)) => {
            let hours = u64::try_from(hours).map_err(|_| error())?;
            Ok(AutoCompaction::Periodic(std::time::Duration::from_secs(hours.saturating_mul(3600))))
        }
        ("periodic", None) => {
            let period = super::parse_duration(text).ok_or_else(error)?;
            let is_off = period.is_zero();
            Ok(if is_off { AutoCompaction::Off } else { AutoCompaction::Periodic(period) })
        }
        ("revision", Some(revisions)) if revisions > 0 => Ok(AutoCompaction::Revision(revisions)),
        ("revision", _) => Err(error()),
        (mode, _) => Err(format!("unknown --auto-compaction-mode \"{mode}\"")),
    }
}
