//! What the soak writes: names like those of kube-apiserver, and values that follow from key and
//! version, so that a reader can tell what must be there. It does no I/O.

/// Keys per namespace.
const NAMESPACE: u32 = 500;
/// All keys whose last value is checked at the end lie below this one.
pub(crate) const PREFIX: &str = "/registry/pods/";
/// Keys with a lease lie below this one.
pub(crate) const EVENTS: &str = "/registry/events/";

/// A small generator of numbers (xorshift); nothing here depends on their quality.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        // Seeds differ in few bits: they are spread over all of them (splitmix), or first draws agree.
        let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((mixed ^ (mixed >> 31)) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`, which must not be 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

pub(crate) fn key(number: u32) -> String {
    format!("{}pod-{number:06}", namespace(number / NAMESPACE))
}

/// The prefix of one namespace.
pub(crate) fn namespace(number: u32) -> String {
    format!("{PREFIX}namespace-{number:04}/")
}

/// Number of namespaces that hold so many keys.
pub(crate) fn namespaces(keys: usize) -> usize {
    keys.div_ceil(NAMESPACE as usize)
}

/// The number that a key was made of.
pub(crate) fn number(key: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(key).ok()?;
    text.rsplit_once("pod-")?.1.parse().ok()
}

/// The first key behind all keys with this prefix.
pub(crate) fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    let last = end.last_mut().expect("a prefix is not empty");
    *last += 1;
    end
}

/// The value of a key at a version: 200 bytes to 2 KiB, most of them small, half of it words that
/// repeat from object to object and half of it not.
pub(crate) fn value(number: u32, version: u32) -> Vec<u8> {
    let mut rng = Rng::new(u64::from(number) << 32 | u64::from(version));
    let most = if rng.below(4) == 0 { 2048 } else { 500 };
    let length = 200 + rng.below(most - 200 + 1);
    let mut text = format!(
        "{{\"kind\":\"Pod\",\"apiVersion\":\"v1\",\"metadata\":{{\"name\":\"pod-{number:06}\",\
         \"generation\":{version},\"uid\":\"{:016x}{:016x}\"}}",
        rng.next(),
        rng.next()
    );
    while text.len() < length {
        let (left, right) = (rng.next(), rng.below(256));
        text +=
            &format!(",{{\"image\":\"registry/app@{left:016x}\",\"podIP\":\"10.0.0.{right}\"}}");
    }
    text.truncate(length);
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_from_key_and_version() {
        assert_eq!(value(7, 3), value(7, 3));
        assert_ne!(value(7, 3), value(7, 4));
        assert_ne!(value(8, 3), value(7, 3));
        let lengths: Vec<usize> = (0..2000).map(|n| value(n, 1).len()).collect();
        assert!(lengths.iter().all(|length| (200..=2048).contains(length)));
        assert!(lengths.iter().any(|length| *length > 1500));
    }

    #[test]
    fn keys_can_be_read_back() {
        for n in [0, 499, 500, 49_999, 999_999] {
            assert_eq!(number(key(n).as_bytes()), Some(n));
            assert!(key(n).starts_with(&namespace(n / NAMESPACE)));
        }
        assert_eq!(number(b"/registry/pods/other"), None);
        assert_eq!(end_of("/a/"), b"/a0");
        assert_eq!(namespaces(501), 2);
    }
}
