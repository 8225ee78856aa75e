//! Checks peer URLs that come in a request: etcd's rules for URLs that a member can listen on. It
//! does not resolve names and does not touch the flags, which have texts of their own.

use kelson_api::Error;

/// Checks a list of peer URLs and returns it trimmed and sorted.
///
/// # Errors
/// `MemberBadUrls` when the list is empty or one of them is not `scheme://host:port`.
pub fn parse(urls: &[String]) -> Result<Vec<String>, Error> {
    if urls.is_empty() {
        return Err(Error::MemberBadUrls);
    }
    let mut parsed: Vec<String> = urls.iter().map(|url| url.trim().to_owned()).collect();
    if !parsed.iter().all(|url| is_valid(url)) {
        return Err(Error::MemberBadUrls);
    }
    parsed.sort_unstable();
    Ok(parsed)
}

fn is_valid(url: &str) -> bool {
    let Some((scheme, rest)) = url.split_once("://") else {
        return false;
    };
    if rest.contains(|c: char| c.is_ascii_control() || c == ' ') {
        return false;
    }
    match scheme {
        "http" | "https" => is_host_and_port(rest),
        "unix" | "unixs" => true,
        _ => false,
    }
}

/// A host, a colon and a port, with no path behind; a host with colons stands in brackets.
fn is_host_and_port(rest: &str) -> bool {
    let Some((host, port)) = rest.rsplit_once(':') else {
        return false;
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let plain = !host.contains([':', '[', ']', '/', '?', '#']);
    (bracketed || plain) && port.chars().all(|c| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked_and_sorted() {
        let parse_of =
            |urls: &[&str]| parse(&urls.iter().map(|url| (*url).to_owned()).collect::<Vec<_>>());
        for bad in [
            "",
            "127.0.0.1:2380",
            "ftp://a:1",
            "http://a",
            "http://a:1/path",
            "http://a:1/",
            "http://::1:2380",
            "http://a:port",
            "http://a b:1",
            "http//a:1",
        ] {
            assert_eq!(parse_of(&[bad]), Err(Error::MemberBadUrls), "{bad}");
        }
        assert_eq!(parse_of(&[]), Err(Error::MemberBadUrls));
        let good = parse_of(&[" https://b:2 ", "http://[::1]:2380", "http://a:1", "unix://x"]);
        let sorted = ["http://[::1]:2380", "http://a:1", "https://b:2", "unix://x"];
        assert_eq!(good, Ok(sorted.map(str::to_owned).to_vec()));
    }
}
