//! The versions this program reports. Clients pick features by the etcd version, so it names the
//! protocol we speak; our own version is only shown, never compared. Read by the Status RPC, by
//! `/version`, by `--version` and by the metrics.

/// Version of etcd whose behavior is served. kube-apiserver (>= 3.5.13) and kubeadm decide by it
/// which calls they may use, so it must never be lower than the features we answer.
pub const ETCD_VERSION: &str = "3.7.3";

/// Cluster version implied by [`ETCD_VERSION`]: its major and minor number with patch 0.
pub const ETCD_CLUSTER_VERSION: &str = "3.7.0";

/// Version of this program itself.
pub const KELSON_VERSION: &str = env!("CARGO_PKG_VERSION");

/// The text that `--version` prints: etcd's four lines, which scripts cut up, then our own.
#[must_use]
pub fn version_text() -> String {
    format!(
        "etcd Version: {ETCD_VERSION}\nGit SHA: {}\nGo Version: {}\nGo OS/Arch: {}/{}\n\
         Kelson Version: {KELSON_VERSION}\n",
        option_env!("KELSON_GIT_SHA").unwrap_or("not recorded"),
        "none (Rust)",
        std::env::consts::OS,
        go_architecture(),
    )
}

/// The processor name as Go spells it, because scripts compare it with `GOARCH` names.
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_text_has_the_four_lines_scripts_cut_up() {
        let text = version_text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "etcd Version: 3.7.3");
        assert!(lines[1].starts_with("Git SHA: "));
        assert!(lines[2].starts_with("Go Version: "));
        assert!(lines[3].starts_with("Go OS/Arch: "));
        assert_eq!(lines.len(), 5);
    }

    #[test]
    fn cluster_version_is_the_minor_of_the_reported_version() {
        let minor = ETCD_VERSION.rsplit_once('.').expect("three parts").0;
        assert_eq!(ETCD_CLUSTER_VERSION, format!("{minor}.0"));
    }
}
