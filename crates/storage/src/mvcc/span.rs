//! Which keys a request means: etcd's rule for `key` and `range_end`. Pure; touches no store.

use std::ops::Bound;

use bytes::Bytes;

/// Both ends of a walk.
pub(crate) type Bounds<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// The keys that a request names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Span {
    start: Bytes,
    end: End,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum End {
    /// Only the start itself.
    Single,
    /// All keys from the start on.
    Open,
    /// Up to but without this key; an end at or below the start means no key at all.
    Before(Bytes),
}

impl Span {
    /// Reads `key` and `range_end` as etcd does.
    pub(crate) fn new(key: &Bytes, range_end: &Bytes) -> Self {
        let end = match range_end.as_ref() {
            [] => End::Single,
            [0] => End::Open,
            _ => End::Before(range_end.clone()),
        };
        Self { start: key.clone(), end }
    }

    /// The one key, if the request names a single one.
    pub(crate) fn single(&self) -> Option<&[u8]> {
        matches!(self.end, End::Single).then_some(self.start.as_ref())
    }

    /// Whether `key` is meant.
    pub(crate) fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            End::Single => key == self.start,
            End::Open => key >= self.start.as_ref(),
            End::Before(end) => key >= self.start.as_ref() && key < end.as_ref(),
        }
    }

    /// Bounds for a walk that goes on behind `after`, or starts at the beginning. `None` if no key
    /// can be left; ordered bounds otherwise, as the tree demands.
    pub(crate) fn bounds<'a>(&'a self, after: Option<&'a [u8]>) -> Option<Bounds<'a>> {
        let start = after.map_or(Bound::Included(self.start.as_ref()), Bound::Excluded);
        let first = after.unwrap_or(self.start.as_ref());
        match &self.end {
            End::Single if after.is_some() => None,
            End::Single => Some((start, Bound::Included(self.start.as_ref()))),
            End::Open => Some((start, Bound::Unbounded)),
            End::Before(end) if first >= end.as_ref() => None,
            End::Before(end) => Some((start, Bound::Excluded(end.as_ref()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(key: &'static [u8], end: &'static [u8]) -> Span {
        Span::new(&Bytes::from_static(key), &Bytes::from_static(end))
    }

    #[test]
    fn the_five_forms() {
        assert!(span(b"b", b"").contains(b"b") && !span(b"b", b"").contains(b"b\0"));
        assert!(span(b"b", b"d").contains(b"c") && !span(b"b", b"d").contains(b"d"));
        assert!(span(b"b", b"\0").contains(b"\xff") && !span(b"b", b"\0").contains(b"a"));
        assert!(span(b"\0", b"\0").contains(b"\0"));
        for end in [&b"b"[..], b"a"] {
            let empty = Span::new(&Bytes::from_static(b"b"), &Bytes::from_static(end));
            assert!(!empty.contains(b"b") && empty.bounds(None).is_none());
        }
    }
}
