//! Flags, environment and config file as the tools around etcd really write them: every flag in
//! every syntax, and the whole argument lists of kubeadm, kops, RKE2, druid and Debian.

use std::collections::BTreeMap;
use std::time::Duration;

use kelson_server::config::{
    Command, Config, FLAGS, Failure, Kind, Loaded, Notice, OLD_NAMES, OldName, load,
};
use kelson_server::limits::AutoCompaction;

fn parse(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Loaded, Failure> {
    let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
    let environment = environment.iter().map(|(name, value)| (name.to_string(), value.to_string()));
    match load(&arguments, environment)? {
        Command::Run(loaded) => Ok(*loaded),
        other => panic!("expected settings, got {other:?}"),
    }
}

fn config(arguments: &[&str]) -> Config {
    parse(arguments, &[]).unwrap_or_else(|failure| panic!("{arguments:?}: {failure:?}")).config
}

fn failure(arguments: &[&str]) -> Failure {
    parse(arguments, &[]).expect_err("the settings should be refused")
}

fn message(failure: &Failure) -> String {
    match failure {
        Failure::Usage(text) => text.clone(),
        Failure::Invalid(notice) => notice.message.clone(),
    }
}

/// Flags that need a partner, or a value of their own, to pass the checks between settings.
const VALUES: &[(&str, &str, &[&str])] = &[
    ("name", "m1", &[]),
    ("heartbeat-interval", "50", &[]),
    ("election-timeout", "3000", &[]),
    ("listen-peer-urls", "http://127.0.0.1:1", &[]),
    ("listen-client-urls", "http://127.0.0.1:2", &["--advertise-client-urls=http://a:2"]),
    ("listen-client-http-urls", "http://127.0.0.1:3", &[]),
    ("listen-metrics-urls", "http://127.0.0.1:4", &[]),
    ("advertise-client-urls", "http://a:5", &[]),
    ("initial-advertise-peer-urls", "http://b:6", &[]),
    ("initial-cluster", "default=http://localhost:2380", &[]),
    ("initial-cluster-state", "existing", &[]),
    ("discovery-fallback", "exit", &[]),
    ("v2-deprecation", "gone", &[]),
    ("discovery-endpoints", "http://127.0.0.1:1", &["--discovery-token=t"]),
    ("discovery-token", "t", &["--discovery-endpoints=http://127.0.0.1:1"]),
    ("backend-bbolt-freelist-type", "array", &[]),
    ("auto-compaction-mode", "revision", &[]),
    ("auto-compaction-retention", "30m", &[]),
    ("watch-progress-notify-interval", "5s", &[]),
    ("feature-gates", "InitialCorruptCheck=true", &[]),
    ("cert-file", "c", &["--key-file=k"]),
    ("key-file", "k", &["--cert-file=c"]),
    ("client-cert-auth", "true", &["--trusted-ca-file=ca"]),
    ("peer-cert-file", "c", &["--peer-key-file=k"]),
    ("peer-key-file", "k", &["--peer-cert-file=c"]),
    ("peer-client-cert-auth", "true", &["--peer-trusted-ca-file=ca"]),
    ("cipher-suites", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", &[]),
    ("tls-min-version", "TLS1.3", &[]),
    ("tls-max-version", "TLS1.3", &[]),
    ("bcrypt-cost", "12", &[]),
    ("metrics", "extensive", &[]),
    ("logger", "zap", &[]),
    ("log-level", "debug", &[]),
    ("log-format", "console", &[]),
    ("config-file", "", &[]),
];

fn value_of(name: &str, kind: Kind) -> (&'static str, &'static [&'static str]) {
    if let Some((_, value, partners)) = VALUES.iter().find(|(known, ..)| *known == name) {
        return (value, partners);
    }
    let value = match kind {
        Kind::Text | Kind::List => "text",
        Kind::Bool => "true",
        Kind::Number => "7",
        Kind::Duration => "1m30s",
    };
    (value, &[])
}

#[test]
fn every_flag_parses_in_every_syntax() {
    for flag in FLAGS.iter() {
        let (value, partners) = value_of(flag.name, flag.kind);
        let mut forms =
            vec![vec![format!("--{}={value}", flag.name)], vec![format!("-{}={value}", flag.name)]];
        if flag.kind == Kind::Bool {
            forms.push(vec![format!("--{}", flag.name)]);
            forms.push(vec![format!("--{}=1", flag.name)]);
        } else {
            forms.push(vec![format!("--{}", flag.name), value.to_owned()]);
        }
        for form in forms {
            let mut arguments: Vec<&str> = form.iter().map(String::as_str).collect();
            arguments.extend(partners);
            let config = config(&arguments);
            assert_eq!((flag.show)(&config), value, "{form:?}");
        }
        if flag.kind == Kind::Bool {
            let off = format!("--{}=false", flag.name);
            assert_eq!((flag.show)(&config(&[&off])), "false", "{off}");
        }
    }
}

#[test]
fn every_flag_is_read_from_the_environment() {
    for flag in FLAGS.iter() {
        let (value, partners) = value_of(flag.name, flag.kind);
        let variable = format!("ETCD_{}", flag.name.to_uppercase().replace('-', "_"));
        let loaded = parse(partners, &[(&variable, value)]);
        let loaded = loaded.unwrap_or_else(|failure| panic!("{variable}: {failure:?}"));
        assert_eq!((flag.show)(&loaded.config), value, "{variable}");
    }
}

#[test]
fn the_documented_flags_exist_with_their_defaults() {
    let documented: BTreeMap<&str, &str> = BTreeMap::from([
        ("name", "default"),
        ("data-dir", ""),
        ("wal-dir", ""),
        ("snapshot-count", "10000"),
        ("snapshot-catchup-entries", "5000"),
        ("max-snapshots", "5"),
        ("max-wals", "5"),
        ("heartbeat-interval", "100"),
        ("election-timeout", "1000"),
        ("initial-election-tick-advance", "true"),
        ("listen-peer-urls", "http://localhost:2380"),
        ("listen-client-urls", "http://localhost:2379"),
        ("listen-client-http-urls", ""),
        ("listen-metrics-urls", ""),
        ("initial-advertise-peer-urls", "http://localhost:2380"),
        ("advertise-client-urls", "http://localhost:2379"),
        ("initial-cluster-state", "new"),
        ("initial-cluster-token", "etcd-cluster"),
        ("discovery-dial-timeout", "2s"),
        ("discovery-request-timeout", "5s"),
        ("discovery-keepalive-time", "2s"),
        ("discovery-keepalive-timeout", "6s"),
        ("discovery-insecure-transport", "true"),
        ("discovery-insecure-skip-tls-verify", "false"),
        ("discovery-fallback", "exit"),
        ("strict-reconfig-check", "true"),
        ("pre-vote", "true"),
        ("auto-compaction-mode", "periodic"),
        ("auto-compaction-retention", "0"),
        ("quota-backend-bytes", "0"),
        ("backend-bbolt-freelist-type", "map"),
        ("max-txn-ops", "128"),
        ("max-request-bytes", "1572864"),
        ("max-concurrent-streams", "4294967295"),
        ("grpc-keepalive-min-time", "5s"),
        ("grpc-keepalive-interval", "2h0m0s"),
        ("grpc-keepalive-timeout", "20s"),
        ("socket-reuse-port", "false"),
        ("socket-reuse-address", "false"),
        ("raft-read-timeout", "5s"),
        ("raft-write-timeout", "5s"),
        ("corrupt-check-time", "0s"),
        ("compact-hash-check-time", "1m0s"),
        ("downgrade-check-time", "5s"),
        ("warning-apply-duration", "100ms"),
        ("warning-unary-request-duration", "300ms"),
        ("memory-mlock", "false"),
        ("bootstrap-defrag-threshold-megabytes", "0"),
        ("max-learners", "1"),
        ("unsafe-no-fsync", "false"),
        ("force-new-cluster", "false"),
        ("self-signed-cert-validity", "1"),
        ("tls-min-version", "TLS1.2"),
        ("tls-max-version", ""),
        ("cors", "*"),
        ("host-whitelist", "*"),
        ("auth-token", "simple"),
        ("bcrypt-cost", "10"),
        ("auth-token-ttl", "300"),
        ("enable-pprof", "false"),
        ("metrics", "basic"),
        ("enable-grpc-gateway", "true"),
        ("logger", "zap"),
        ("log-outputs", "default"),
        ("log-level", "info"),
        ("log-format", "json"),
        ("enable-log-rotation", "false"),
        ("enable-distributed-tracing", "false"),
        ("distributed-tracing-address", "localhost:4317"),
        ("distributed-tracing-service-name", "etcd"),
        ("distributed-tracing-sampling-rate", "0"),
    ]);
    let defaults = Config::default();
    for (name, default) in documented {
        let flag = FLAGS.iter().find(|flag| flag.name == name).expect(name);
        assert_eq!((flag.show)(&defaults), default, "{name}");
    }
    let others = [
        "client-cert-file",
        "client-key-file",
        "client-crl-file",
        "peer-crl-file",
        "client-cert-allowed-hostname",
        "auto-tls",
        "peer-auto-tls",
        "peer-client-cert-file",
        "peer-client-key-file",
        "peer-cert-allowed-cn",
        "peer-cert-allowed-hostname",
        "peer-skip-client-san-verification",
        "discovery-srv",
        "discovery-srv-name",
        "discovery-endpoints",
        "discovery-token",
        "discovery-cert",
        "discovery-key",
        "discovery-cacert",
        "discovery-user",
        "discovery-password",
        "backend-batch-interval",
        "backend-batch-limit",
        "compaction-batch-limit",
        "compaction-sleep-interval",
        "watch-progress-notify-interval",
        "v2-deprecation",
        "feature-gates",
        "config-file",
        "log-rotation-config-json",
        "distributed-tracing-instance-id",
        "initial-cluster",
    ];
    for name in others {
        assert!(FLAGS.iter().any(|flag| flag.name == name), "{name}");
    }
    let mut names: Vec<&str> = FLAGS.iter().map(|flag| flag.name).collect();
    names.extend(OLD_NAMES.iter().map(|(name, _)| *name));
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count, "a name stands twice in the tables");
}

#[test]
fn every_old_name_is_accepted() {
    for (name, meaning) in OLD_NAMES {
        let argument = match meaning {
            OldName::Flag(new) => {
                let flag = FLAGS.iter().find(|flag| flag.name == *new).expect(new);
                format!("--{name}={}", value_of(new, flag.kind).0)
            }
            OldName::Gate(_) => format!("--{name}=true"),
            OldName::OnlyValue(only) => format!("--{name}={only}"),
            OldName::Gone(_) => format!("--{name}=1"),
        };
        let mut arguments = vec![argument.as_str()];
        if *name == "experimental-enable-lease-checkpoint-persist" {
            arguments.push("--experimental-enable-lease-checkpoint");
        }
        let loaded = parse(&arguments, &[]).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let told = loaded.notices.iter().any(|notice| notice.message.contains(name));
        let is_silent = matches!(meaning, OldName::OnlyValue(_));
        assert!(told || is_silent, "nothing was said about --{name}");
    }
}

#[test]
fn old_names_set_what_the_new_ones_set() {
    let config = config(&[
        "--experimental-watch-progress-notify-interval=5s",
        "--experimental-initial-corrupt-check=true",
        "--experimental-snapshot-catch-up-entries=17",
    ]);
    assert_eq!(config.watch_progress_notify_interval, Duration::from_secs(5));
    assert_eq!(config.snapshot_catchup_entries, 17);
    assert!(config.feature_gates.enabled("InitialCorruptCheck"));
}

#[test]
fn both_spellings_of_one_setting_are_refused() {
    let cases: [&[&str]; 3] = [
        &["--corrupt-check-time=1s", "--experimental-corrupt-check-time=1s"],
        &["--experimental-initial-corrupt-check", "--feature-gates=InitialCorruptCheck=true"],
        &["--feature-gates=LeaseCheckpoint=true", "--experimental-enable-lease-checkpoint"],
    ];
    for arguments in cases {
        let failure = failure(arguments);
        assert_eq!(failure.exit_code(), 1, "{arguments:?}");
        assert!(message(&failure).starts_with("cannot specify both flags: "), "{failure:?}");
    }
}

#[test]
fn a_command_line_that_does_not_parse_ends_with_2() {
    let cases: [(&[&str], &str); 10] = [
        (&["--nope"], "flag provided but not defined: -nope"),
        (&["--nope=1"], "flag provided but not defined: -nope"),
        (&["---name=x"], "bad flag syntax: ---name=x"),
        (&["--=x"], "bad flag syntax: --=x"),
        (&["--name"], "flag needs an argument: -name"),
        (&["--snapshot-count=ten"], "invalid value \"ten\" for flag -snapshot-count: parse error"),
        (
            &["--client-cert-auth=maybe"],
            "invalid boolean value \"maybe\" for -client-cert-auth: parse error",
        ),
        (
            &["--corrupt-check-time=5"],
            "invalid value \"5\" for flag -corrupt-check-time: parse error",
        ),
        (
            &["--feature-gates=Nope=true"],
            "invalid value \"Nope=true\" for flag -feature-gates: unrecognized feature gate: Nope",
        ),
        (
            &["--listen-peer-urls=localhost:1"],
            "invalid value \"localhost:1\" for flag -listen-peer-urls: URL scheme must be http, \
          https, unix, or unixs: localhost:1",
        ),
    ];
    for (arguments, text) in cases {
        let failure = failure(arguments);
        assert_eq!(failure.exit_code(), 2, "{arguments:?}");
        assert_eq!(message(&failure), text);
    }
}

#[test]
fn settings_that_do_not_fit_together_end_with_1() {
    let cases: [(&[&str], &str); 23] = [
        (&["stray"], "\"stray\" is not a valid flag"),
        (&["--client-cert-auth", "true"], "\"true\" is not a valid flag"),
        (&["--", "--name=x"], "\"--name=x\" is not a valid flag"),
        (
            &["--listen-client-urls=http://0.0.0.0:2379"],
            "--advertise-client-urls is required when --listen-client-urls is set explicitly",
        ),
        (
            &["--election-timeout=200"],
            "--election-timeout[200ms] should be at least as 5 times as --heartbeat-interval[100ms]",
        ),
        (
            &["--election-timeout=50001"],
            "--election-timeout[50001ms] is too long, and should be set less than 50000ms",
        ),
        (
            &["--listen-peer-urls=http://example.com:1"],
            "expected IP in URL for binding (http://example.com:1)",
        ),
        (
            &["--tls-min-version=TLS1.1"],
            "unexpected TLS version \"TLS1.1\" (must be one of: TLS1.2, TLS1.3)",
        ),
        (
            &["--tls-min-version=TLS1.3", "--cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"],
            "cipher suites cannot be configured when only TLS1.3 is enabled",
        ),
        (&["--cipher-suites=TLS_NONE"], "unexpected TLS cipher suite \"TLS_NONE\""),
        (
            &["--listen-peer-urls=https://127.0.0.1:1"],
            "TLS key/cert (--peer-cert-file, --peer-key-file) must be provided for peer url \
             https://127.0.0.1:1 with HTTPS scheme",
        ),
        (
            &[
                "--listen-client-urls=https://127.0.0.1:1",
                "--advertise-client-urls=https://127.0.0.1:1",
            ],
            "TLS key/cert (--cert-file, --key-file) must be provided for client url \
             https://127.0.0.1:1 with HTTPS scheme",
        ),
        (
            &["--listen-metrics-urls=https://127.0.0.1:1"],
            "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url \
             https://127.0.0.1:1",
        ),
        (
            &["--initial-cluster=a=http://localhost:2380"],
            "couldn't find local name \"default\" in the initial cluster configuration",
        ),
        (
            &["--initial-cluster=default=http://127.0.0.1:1"],
            "--initial-cluster has default=http://127.0.0.1:1 but --initial-advertise-peer-urls has \
          default=http://localhost:2380",
        ),
        (
            &["--initial-cluster=default=http://localhost:2380,b=http://localhost:2380"],
            "initial cluster has duplicate URLs: default=http://localhost:2380,\
          b=http://localhost:2380",
        ),
        (
            &["--initial-cluster-state=old"],
            "invalid value \"old\" for flag -initial-cluster-state: must be one of new, existing",
        ),
        (
            &["--discovery-token=t"],
            "both --discovery-endpoints and --discovery-token need to be set",
        ),
        (
            &["--discovery-token=t", "--discovery-endpoints=http://e:1", "--discovery-srv=d"],
            "multiple discovery or bootstrap flags are set. Choose one of \"initial-cluster\", \
          \"discovery\", \"discovery-endpoints\" or \"discovery-srv\"",
        ),
        (&["--proxy=on"], "--proxy=on is not supported: this part of etcd 2 no longer exists"),
        (&["--auto-compaction-mode=daily"], "unknown --auto-compaction-mode \"daily\""),
        (
            &["--feature-gates=LeaseCheckpointPersist=true"],
            "enabling feature gate LeaseCheckpointPersist requires enabling feature gate \
          LeaseCheckpoint",
        ),
        (
            &["--cert-file=only"],
            "client certificate and key file must both be given or both be absent",
        ),
    ];
    for (arguments, text) in cases {
        let failure = failure(arguments);
        assert_eq!(message(&failure), text, "{arguments:?}");
        assert_eq!(failure.exit_code(), 1, "{arguments:?}");
    }
}

#[test]
fn only_one_way_to_find_members_may_be_given() {
    let failure = failure(&[
        "--initial-cluster=default=http://localhost:2380",
        "--discovery-srv=example.com",
    ]);
    assert!(message(&failure).starts_with("multiple discovery or bootstrap flags are set."));
}

#[test]
fn a_flag_and_its_variable_together_are_refused() {
    let failure = parse(&["--name=a"], &[("ETCD_NAME", "a")]).expect_err("shadowed");
    let Failure::Invalid(notice) = &failure else { panic!("{failure:?}") };
    assert_eq!(failure.exit_code(), 1);
    assert_eq!(
        notice.message,
        "conflicting environment variable is shadowed by corresponding command-line flag (either \
         unset environment variable or disable flag))"
    );
    assert_eq!((notice.field, notice.value.as_str()), ("environment-variable", "ETCD_NAME"));
}

#[test]
fn foreign_and_empty_variables_do_no_harm() {
    let loaded = parse(
        &["--name=a"],
        &[
            ("ETCD_NAME", ""),
            ("ETCD_PORT_2379_TCP", "tcp://10.0.0.1:2379"),
            ("ETCD_VERSION", "v3.5.0"),
            ("ETCD_UNSUPPORTED_ARCH", "arm64"),
            ("HOME", "/root"),
        ],
    );
    let loaded = loaded.expect("accepted");
    assert_eq!(loaded.config.name, "a");
    let warned: Vec<&str> = loaded
        .notices
        .iter()
        .filter(|notice| notice.message == "unrecognized environment variable")
        .map(|notice| notice.value.as_str())
        .collect();
    assert_eq!(warned, ["ETCD_PORT_2379_TCP"]);
}

#[test]
fn a_variable_that_does_not_parse_ends_with_1() {
    let failure = parse(&[], &[("ETCD_SNAPSHOT_COUNT", "x")]).expect_err("refused");
    assert_eq!(failure.exit_code(), 1);
}

#[test]
fn flags_without_effect_are_told_with_their_reason_but_not_at_their_default() {
    let loaded = parse(&["--max-wals=3", "--backend-batch-limit=0"], &[]).expect("accepted");
    let told: Vec<&str> = loaded.notices.iter().map(|notice| notice.value.as_str()).collect();
    assert_eq!(told, ["max-wals"]);
    assert!(loaded.notices[0].message.contains("accepted without effect"));
}

#[test]
fn flags_that_etcd_will_drop_say_so() {
    let arguments = ["--max-snapshots=5", "--v2-deprecation=gone"];
    let loaded = parse(&arguments, &[]).expect("accepted");
    let told: Vec<&str> = loaded.notices.iter().map(|notice| notice.message.as_str()).collect();
    let max = "--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8.";
    assert!(told.contains(&max), "{told:?}");
    let v2 = "--v2-deprecation is deprecated and scheduled for removal in v3.8. The default value is \
              enforced, ignoring user input.";
    assert!(told.contains(&v2), "{told:?}");
    assert!(parse(&[], &[]).expect("accepted").notices.is_empty());
    let refused = failure(&["--v2-deprecation=not-yet"]);
    assert_eq!(refused.exit_code(), 2);
    let text = "invalid value \"not-yet\" for flag -v2-deprecation: invalid value \"not-yet\"";
    assert_eq!(message(&refused), text);
}

#[test]
fn only_a_name_makes_a_cluster_of_that_name() {
    let config = config(&["--name=m1", "--initial-advertise-peer-urls=http://h:1,http://h:2"]);
    assert_eq!(config.data_dir, "m1.etcd");
    assert_eq!(config.initial_cluster, "m1=http://h:1,m1=http://h:2");
    assert_eq!(
        config.cluster_members(),
        Ok(vec![("m1".to_owned(), vec!["http://h:1".to_owned(), "http://h:2".to_owned()])])
    );
}

#[test]
fn limits_follow_the_flags() {
    let limits = config(&[
        "--quota-backend-bytes=-1",
        "--auto-compaction-retention=2",
        "--max-txn-ops=7",
        "--election-timeout=2000",
        "--watch-progress-notify-interval=3s",
    ])
    .limits();
    assert_eq!(limits.quota_backend_bytes, -1);
    assert_eq!(limits.auto_compaction, AutoCompaction::Periodic(Duration::from_secs(7200)));
    assert_eq!(limits.max_txn_ops, 7);
    assert_eq!(limits.request_timeout, Duration::from_secs(9));
    assert_eq!(limits.min_lease_ttl, 3);
    assert_eq!(limits.progress_notify_interval, Duration::from_secs(3));
    // etcd raises what is too short, and says so.
    let short = parse(&["--watch-progress-notify-interval=10ms"], &[]).expect("it is accepted");
    assert_eq!(short.config.limits().progress_notify_interval, Duration::from_millis(100));
    let said = |notice: &Notice| notice.is_warning && notice.message.contains("raised to 100ms");
    assert!(short.notices.iter().any(said), "{:?}", short.notices);
    let revisions = ["--auto-compaction-mode=revision", "--auto-compaction-retention=1000"];
    assert_eq!(config(&revisions).limits().auto_compaction, AutoCompaction::Revision(1000));
    assert_eq!(config(&[]).limits(), kelson_server::limits::Limits::default());
}

/// The argument list of a kubeadm static pod; `rest` differs between versions.
fn kubeadm(rest: &[&'static str]) -> Vec<&'static str> {
    let mut arguments = vec![
        "--advertise-client-urls=https://10.0.0.1:2379",
        "--cert-file=/etc/kubernetes/pki/etcd/server.crt",
        "--client-cert-auth=true",
        "--data-dir=/var/lib/etcd-of-no-one",
        "--initial-advertise-peer-urls=https://10.0.0.1:2380",
        "--initial-cluster=cp1=https://10.0.0.1:2380",
        "--key-file=/etc/kubernetes/pki/etcd/server.key",
        "--listen-client-urls=https://127.0.0.1:2379,https://10.0.0.1:2379",
        "--listen-metrics-urls=http://127.0.0.1:2381",
        "--listen-peer-urls=https://10.0.0.1:2380",
        "--name=cp1",
        "--peer-cert-file=/etc/kubernetes/pki/etcd/peer.crt",
        "--peer-client-cert-auth=true",
        "--peer-key-file=/etc/kubernetes/pki/etcd/peer.key",
        "--peer-trusted-ca-file=/etc/kubernetes/pki/etcd/ca.crt",
        "--snapshot-count=10000",
        "--trusted-ca-file=/etc/kubernetes/pki/etcd/ca.crt",
    ];
    arguments.extend(rest);
    arguments
}

#[test]
fn kubeadm_argument_lists_are_accepted() {
    let old = kubeadm(&[
        "--experimental-initial-corrupt-check=true",
        "--experimental-watch-progress-notify-interval=5s",
    ]);
    let new = kubeadm(&[
        "--feature-gates=InitialCorruptCheck=true",
        "--watch-progress-notify-interval=5s",
    ]);
    let (old, new) = (config(&old), config(&new));
    assert_eq!(old, new);
    assert_eq!(new.listen_client_urls.len(), 2);
    assert!(new.client_tls.client_cert_auth && new.peer_tls.client_cert_auth);
    assert_eq!(new.watch_progress_notify_interval, Duration::from_secs(5));
    assert!(new.feature_gates.enabled("InitialCorruptCheck"));

    let joining = [
        "--initial-cluster-state=existing",
        "--initial-advertise-peer-urls=https://[fd00::2]:2380",
        "--initial-cluster=cp1=https://[fd00::1]:2380,cp2=https://[fd00::2]:2380",
        "--listen-client-urls=https://[::1]:2379,https://[fd00::2]:2379",
        "--advertise-client-urls=https://[fd00::2]:2379",
        "--listen-metrics-urls=http://[::1]:2381",
        "--cert-file=c",
        "--key-file=k",
        "--name=cp2",
    ];
    assert_eq!(config(&joining).initial_cluster_state, "existing");
}

#[test]
fn kops_environment_is_accepted() {
    let environment = [
        ("ETCD_DATA_DIR", "/rootfs/mnt/of-no-one/data"),
        ("ETCD_LOGGER", "zap"),
        ("ETCD_LOG_OUTPUTS", "stdout"),
        ("ETCD_LISTEN_PEER_URLS", "https://0.0.0.0:2380"),
        ("ETCD_LISTEN_CLIENT_URLS", "https://0.0.0.0:4001"),
        ("ETCD_ADVERTISE_CLIENT_URLS", "https://etcd-a.internal.example:4001"),
        ("ETCD_INITIAL_ADVERTISE_PEER_URLS", "https://etcd-a.internal.example:2380"),
        ("ETCD_LISTEN_METRICS_URLS", "http://0.0.0.0:8081"),
        ("ETCD_INITIAL_CLUSTER_STATE", "new"),
        ("ETCD_NAME", "etcd-a"),
        ("ETCD_INITIAL_CLUSTER_TOKEN", "token"),
        ("ETCD_INITIAL_CLUSTER", "etcd-a=https://etcd-a.internal.example:2380"),
        ("ETCD_STRICT_RECONFIG_CHECK", "true"),
        ("ETCD_PEER_CLIENT_CERT_AUTH", "true"),
        ("ETCD_PEER_TRUSTED_CA_FILE", "/p/ca.crt"),
        ("ETCD_PEER_CERT_FILE", "/p/me.crt"),
        ("ETCD_PEER_KEY_FILE", "/p/me.key"),
        ("ETCD_CLIENT_CERT_AUTH", "true"),
        ("ETCD_TRUSTED_CA_FILE", "/c/ca.crt"),
        ("ETCD_CERT_FILE", "/c/server.crt"),
        ("ETCD_KEY_FILE", "/c/server.key"),
        ("ETCD_EXPERIMENTAL_INITIAL_CORRUPT_CHECK", "true"),
    ];
    let loaded = parse(&["--force-new-cluster"], &environment).expect("accepted");
    assert_eq!(loaded.config.name, "etcd-a");
    assert_eq!(loaded.config.log_outputs, ["stdout"]);
    assert!(loaded.config.feature_gates.enabled("InitialCorruptCheck"));
    assert!(loaded.config.force_new_cluster);
}

#[test]
fn operator_and_debian_lists_are_accepted() {
    let arguments = [
        "--name=sample-0",
        "--listen-peer-urls=http://0.0.0.0:2380",
        "--listen-client-urls=http://0.0.0.0:2379",
        "--initial-advertise-peer-urls=http://sample-0.sample.default.svc:2380",
        "--advertise-client-urls=http://sample-0.sample.default.svc:2379",
    ];
    let environment = [
        ("ETCD_INITIAL_CLUSTER_STATE", "new"),
        ("ETCD_INITIAL_CLUSTER", "sample-0=http://sample-0.sample.default.svc:2380"),
        ("ETCD_DATA_DIR", "/var/lib/etcd-of-no-one"),
    ];
    let loaded = parse(&arguments, &environment).expect("accepted");
    assert_eq!(loaded.config.cluster_members().map(|members| members.len()), Ok(1));

    let debian = [("ETCD_NAME", "host"), ("ETCD_DATA_DIR", "/var/lib/etcd-of-no-one/default")];
    let loaded = parse(&[], &debian).expect("accepted");
    assert_eq!(loaded.config.initial_cluster, "host=http://localhost:2380");
}

fn from_file(text: &str) -> Result<Loaded, Failure> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("config");
    std::fs::write(&path, text).expect("written");
    let path = path.display().to_string();
    // Flags and variables beside a file are ignored, even a clashing pair.
    parse(&["--config-file", &path, "--name=flag"], &[("ETCD_NAME", "variable")])
}

#[test]
fn rke2_config_file_is_accepted() {
    let text = "\
advertise-client-urls: https://10.0.0.1:2379
client-transport-security:
  cert-file: /s/server-client.crt
  client-cert-auth: true
  key-file: /s/server-client.key
  trusted-ca-file: /s/server-ca.crt
data-dir: /var/lib/rancher/rke2/server/db/etcd-of-no-one
election-timeout: 5000
experimental-initial-corrupt-check: true
experimental-watch-progress-notify-interval: 5000000000
heartbeat-interval: 500
initial-advertise-peer-urls: https://10.0.0.1:2380
initial-cluster: node-1=https://10.0.0.1:2380
initial-cluster-state: new
listen-client-http-urls: https://127.0.0.1:2382
listen-client-urls: https://127.0.0.1:2379,https://10.0.0.1:2379
listen-metrics-urls: http://127.0.0.1:2381
listen-peer-urls: https://127.0.0.1:2380,https://10.0.0.1:2380
log-outputs:
- stderr
logger: zap
name: node-1
peer-transport-security:
  cert-file: /s/peer.crt
  client-cert-auth: true
  key-file: /s/peer.key
  trusted-ca-file: /s/peer-ca.crt
snapshot-count: 10000
socket-options:
  reuse-address: true
  reuse-port: true
";
    let config = from_file(text).expect("accepted").config;
    assert_eq!(config.name, "node-1");
    assert_eq!(config.heartbeat_interval_ms, 500);
    assert_eq!(config.watch_progress_notify_interval, Duration::from_secs(5));
    assert_eq!(config.log_outputs, ["stderr"]);
    assert_eq!(config.client_tls.cert_file, "/s/server-client.crt");
    assert_eq!(config.peer_tls.trusted_ca_file, "/s/peer-ca.crt");
    assert!(config.peer_tls.client_cert_auth && config.client_tls.client_cert_auth);
    assert!(config.socket_reuse_port && config.socket_reuse_address);
    assert!(config.feature_gates.enabled("InitialCorruptCheck"));
}

#[test]
fn druid_config_file_is_accepted() {
    let text = "\
name: etcd-main-0
data-dir: /var/etcd/data/of-no-one
metrics: basic
snapshot-count: 10000
quota-backend-bytes: 8589934592
enable-grpc-gateway: true
next-cluster-version-compatible: false
initial-cluster-token: etcd-cluster
initial-cluster-state: new
initial-cluster: etcd-main-0=https://etcd-main-0.etcd-main-peer.ns.svc:2380
auto-compaction-mode: periodic
auto-compaction-retention: 30m
backend-bbolt-freelist-type: array
listen-client-urls: https://0.0.0.0:2379
advertise-client-urls: https://etcd-main-0.etcd-main-peer.ns.svc:2379
listen-peer-urls: https://0.0.0.0:2380
initial-advertise-peer-urls: https://etcd-main-0.etcd-main-peer.ns.svc:2380
client-transport-security:
  cert-file: /s/tls.crt
  key-file: /s/tls.key
  client-cert-auth: true
  trusted-ca-file: /s/bundle.crt
  auto-tls: false
peer-transport-security:
  cert-file: /p/tls.crt
  key-file: /p/tls.key
  client-cert-auth: true
  trusted-ca-file: /p/bundle.crt
  auto-tls: false
  skip-client-san-verification: true
";
    let config = from_file(text).expect("accepted").config;
    assert_eq!(config.quota_backend_bytes, 8 << 30);
    assert_eq!(
        config.limits().auto_compaction,
        AutoCompaction::Periodic(Duration::from_secs(1800))
    );
    assert!(config.peer_tls.skip_client_san_verification);
}

#[test]
fn config_files_may_be_json_and_hold_unknown_keys() {
    let loaded = from_file(
        r#"{"name": "j", "corrupt-check-time": "5s", "nope": {"a": 1}, "cipher-suites":
            ["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"],
            "peer-transport-security": {"allowed-cn": ["a", "b"]}}"#,
    );
    let loaded = loaded.expect("accepted");
    assert_eq!(loaded.config.corrupt_check_time, Duration::from_secs(5));
    assert_eq!(loaded.config.cipher_suites.len(), 2);
    assert_eq!(loaded.config.peer_tls.allowed_cn, ["a", "b"]);
    assert!(loaded.notices.iter().any(|notice| notice.value == "nope"));
    assert_eq!(from_file("").expect("an empty file").config.name, "default");
}

#[test]
fn a_sample_file_of_etcd_may_name_the_proxy_that_is_gone() {
    let loaded = from_file("name: m1\ndiscovery-fallback: 'proxy'\n").expect("accepted");
    assert_eq!(loaded.config.name, "m1");
    assert!(loaded.notices.iter().any(|notice| notice.value == "discovery-fallback"));
    assert_eq!(failure(&["--discovery-fallback=proxy"]).exit_code(), 1);
}

#[test]
fn bad_config_files_end_with_1() {
    for text in ["name: [", "- a", "heartbeat-interval: soon", "client-transport-security: 1"] {
        assert_eq!(from_file(text).expect_err("refused").exit_code(), 1, "{text}");
    }
    let absent = failure(&["--config-file=/nonexistent/config"]);
    assert_eq!(absent.exit_code(), 1);
}
