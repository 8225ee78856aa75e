//! Member and cluster ids by etcd's rules, so that tools and humans see the ids they know. Pure
//! functions; ids are computed once, at the first start, and then read from the data directory.

use sha1::{Digest, Sha1};

/// Id of a member that is part of the bootstrap configuration: the first eight bytes of the SHA-1
/// of its sorted peer URLs and the cluster token.
pub fn bootstrap_member_id(peer_urls: &[String], token: &str) -> u64 {
    digest_of_urls(peer_urls, token)
}

/// Id of a member that is added to a running cluster: as at bootstrap, with the time of the request in
/// seconds since 1970 in the place of the token.
pub(crate) fn added_member_id(peer_urls: &[String], unix_seconds: u64) -> u64 {
    digest_of_urls(peer_urls, &unix_seconds.to_string())
}

/// Id of a cluster: the first eight bytes of the SHA-1 of its member ids in ascending order.
pub fn cluster_id(member_ids: &[u64]) -> u64 {
    let mut sorted = member_ids.to_vec();
    sorted.sort_unstable();
    let mut hash = Sha1::new();
    for id in sorted {
        hash.update(id.to_be_bytes());
    }
    first_eight(hash)
}

fn digest_of_urls(peer_urls: &[String], suffix: &str) -> u64 {
    let mut sorted: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    let mut hash = Sha1::new();
    for url in sorted {
        hash.update(url.as_bytes());
    }
    hash.update(suffix.as_bytes());
    first_eight(hash)
}

fn first_eight(hash: Sha1) -> u64 {
    let digest = hash.finalize();
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest[..8]);
    u64::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a default etcd shows: `8e9e05c52164694d` in cluster `cdf818194e3a8c32`.
    #[test]
    fn ids_of_a_default_etcd() {
        let urls = ["http://localhost:2380".to_owned()];
        let member = bootstrap_member_id(&urls, "etcd-cluster");
        assert_eq!(format!("{member:x}"), "8e9e05c52164694d");
        assert_eq!(format!("{:x}", cluster_id(&[member])), "cdf818194e3a8c32");
    }

    #[test]
    fn the_same_urls_get_another_id_at_another_time() {
        let urls = ["http://b:2380".to_owned()];
        assert_ne!(added_member_id(&urls, 1), added_member_id(&urls, 2));
        assert_eq!(added_member_id(&urls, 7), bootstrap_member_id(&urls, "7"));
    }

    #[test]
    fn order_does_not_matter() {
        let urls = ["http://b:2380".to_owned(), "http://a:2380".to_owned()];
        let turned = ["http://a:2380".to_owned(), "http://b:2380".to_owned()];
        assert_eq!(bootstrap_member_id(&urls, "t"), bootstrap_member_id(&turned, "t"));
        assert_ne!(bootstrap_member_id(&urls, "t"), bootstrap_member_id(&urls, "u"));
        assert_eq!(cluster_id(&[2, 1]), cluster_id(&[1, 2]));
    }
}
