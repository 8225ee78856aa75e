//! Which keys a user may read and write: the ranges of all permissions that his roles hold, joined.
//! A range of keys is allowed if all of it is, whichever permissions cover its parts.

use bytes::Bytes;
use kelson_api::authpb::{Permission, permission};

/// What is done to keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// Keys from `start` on, up to but without `end`; `None` = to the last of all keys.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stretch {
    start: Bytes,
    end: Option<Bytes>,
}

/// What one user may do. Stretches are in order and neither meet nor overlap.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Rights {
    read: Vec<Stretch>,
    write: Vec<Stretch>,
}

fn is_open(range_end: &[u8]) -> bool {
    range_end == b"\0"
}

/// Whether a permission may name this range: a key, a range that is not empty, or one with an open end.
pub(crate) fn is_valid_range(key: &[u8], range_end: &[u8]) -> bool {
    let is_range = range_end.is_empty() || is_open(range_end) || key < range_end;
    !key.is_empty() && is_range
}

/// The end of a range as etcd writes ranges: none = the key alone, a zero byte = open.
fn end_of(key: &[u8], range_end: &[u8]) -> Option<Bytes> {
    if is_open(range_end) {
        None
    } else if range_end.is_empty() {
        Some(Bytes::from([key, b"\0"].concat()))
    } else {
        Some(Bytes::copy_from_slice(range_end))
    }
}

impl Stretch {
    fn of(permission: &Permission) -> Self {
        let end = end_of(&permission.key, &permission.range_end);
        Self { start: permission.key.clone(), end }
    }

    fn reaches(&self, key: &[u8]) -> bool {
        self.end.as_deref().is_none_or(|end| end >= key)
    }
}

/// Sorts stretches and joins those that meet.
fn join(mut stretches: Vec<Stretch>) -> Vec<Stretch> {
    stretches.sort_unstable();
    let mut joined: Vec<Stretch> = Vec::new();
    for stretch in stretches {
        match joined.last_mut().filter(|last| last.reaches(&stretch.start)) {
            None => joined.push(stretch),
            Some(last) => {
                let (ours, theirs) = (last.end.take(), stretch.end);
                last.end = ours.zip(theirs).map(|(ours, theirs)| ours.max(theirs));
            }
        }
    }
    joined
}

impl Rights {
    /// What these permissions allow together.
    pub(crate) fn of<'a>(permissions: impl Iterator<Item = &'a Permission>) -> Self {
        let (mut read, mut write) = (Vec::new(), Vec::new());
        for permission in permissions {
            let stretch = Stretch::of(permission);
            // Stores of other versions may hold ranges that no longer can be granted.
            if stretch.end.as_ref().is_some_and(|end| *end <= stretch.start) {
                continue;
            }
            let kind = permission::Type::try_from(permission.perm_type);
            if matches!(kind, Ok(permission::Type::Read | permission::Type::Readwrite)) {
                read.push(stretch.clone());
            }
            if matches!(kind, Ok(permission::Type::Write | permission::Type::Readwrite)) {
                write.push(stretch);
            }
        }
        Self { read: join(read), write: join(write) }
    }

    /// Whether all of a range is allowed.
    pub(crate) fn covers(&self, key: &[u8], range_end: &[u8], access: Access) -> bool {
        let stretches = match access {
            Access::Read => &self.read,
            Access::Write => &self.write,
        };
        let behind = stretches.partition_point(|stretch| stretch.start <= key);
        let Some(stretch) = behind.checked_sub(1).map(|at| &stretches[at]) else { return false };
        let Some(end) = &stretch.end else { return true };
        let asked = end_of(key, range_end);
        // A range that ends before it begins holds no key; it must lie inside all the same.
        asked.is_some_and(|asked| asked <= *end && stretch.start < asked) && key < end.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(permissions: &[(&str, &str, permission::Type)]) -> Rights {
        let permissions: Vec<Permission> = permissions
            .iter()
            .map(|(key, end, kind)| Permission {
                perm_type: *kind as i32,
                key: Bytes::copy_from_slice(key.as_bytes()),
                range_end: Bytes::copy_from_slice(end.as_bytes()),
            })
            .collect();
        Rights::of(permissions.iter())
    }

    use permission::Type::{Read, Readwrite, Write};

    #[test]
    fn a_key_is_one_key() {
        let rights = rights(&[("a", "", Read)]);
        assert!(rights.covers(b"a", b"", Access::Read));
        assert!(!rights.covers(b"a", b"", Access::Write));
        assert!(!rights.covers(b"a\0", b"", Access::Read));
        assert!(!rights.covers(b"", b"", Access::Read));
        assert!(!rights.covers(b"a", b"b", Access::Read));
        assert!(!rights.covers(b"a", b"\0", Access::Read), "one key is no open end");
        assert!(rights.covers(b"a", b"a\0", Access::Read), "the same, said as a range");
    }

    #[test]
    fn ranges_that_meet_are_one() {
        let rights = rights(&[("c", "e", Read), ("a", "c", Readwrite), ("e", "", Read)]);
        assert!(rights.covers(b"a", b"e\0", Access::Read));
        assert!(!rights.covers(b"a", b"e\x01", Access::Read));
        assert!(rights.covers(b"a", b"c", Access::Write));
        assert!(!rights.covers(b"a", b"d", Access::Write));
        assert_eq!(rights.read.len(), 1);
    }

    #[test]
    fn a_gap_is_a_gap() {
        let rights = rights(&[("a", "b", Write), ("b\0", "z", Write), ("a", "aa", Write)]);
        assert!(!rights.covers(b"a", b"c", Access::Write), "the key b is missing");
        assert!(rights.covers(b"a", b"b", Access::Write));
        assert!(!rights.covers(b"b", b"", Access::Write));
        assert!(rights.covers(b"bb", b"z", Access::Write));
        assert!(!rights.covers(b"z", b"", Access::Write));
    }

    #[test]
    fn only_an_open_end_covers_an_open_end() {
        let open = rights(&[("b", "\0", Read), ("a", "\u{7f}", Read)]);
        assert!(open.covers(b"a", b"\0", Access::Read));
        assert!(open.covers(b"\xff\xff", b"", Access::Read));
        assert!(!open.covers(b"\0", b"\0", Access::Read));
        let closed = rights(&[("\0", "\u{7f}", Read)]);
        assert!(!closed.covers(b"\0", b"\0", Access::Read));
    }

    #[test]
    fn a_range_that_ends_before_it_begins_must_lie_inside() {
        let rights = rights(&[("b", "m", Read)]);
        assert!(rights.covers(b"g", b"d", Access::Read));
        assert!(!rights.covers(b"g", b"a", Access::Read));
        assert!(!rights.covers(b"x", b"d", Access::Read));
    }

    #[test]
    fn permissions_name_keys_or_ranges() {
        assert!(is_valid_range(b"a", b"") && is_valid_range(b"a", b"b"));
        assert!(is_valid_range(b"b", b"\0"));
        assert!(!is_valid_range(b"", b"b") && !is_valid_range(b"b", b"b"));
        assert!(!is_valid_range(b"b", b"a") && !is_valid_range(b"", b""));
    }
}
