//! Files whose pages are each right by themselves and wrong together: whoever makes such a file could
//! let a small one be read for hours, so its reader refuses it.

use kelson_storage::etcd::Database;

const PAGE: usize = 4096;
const BRANCH: u16 = 1;
const LEAF: u16 = 2;

/// Bytes in a page of its own, and what follows it.
fn page(number: u64, kind: u16, count: usize, more: u32, content: &[u8]) -> Vec<u8> {
    let mut page = number.to_le_bytes().to_vec();
    page.extend(kind.to_le_bytes());
    page.extend(u16::try_from(count).expect("few").to_le_bytes());
    page.extend(more.to_le_bytes());
    page.extend(content);
    assert!(page.len() <= PAGE);
    page.resize(PAGE, 0);
    page
}

/// A leaf, with each value as much longer than it is as `stretch` says: it then reaches into what
/// stands behind it.
fn leaf(number: u64, pairs: &[(&[u8], &[u8])], flags: u32, more: u32, stretch: usize) -> Vec<u8> {
    let mut content = Vec::new();
    let mut data = Vec::new();
    for (place, (key, value)) in pairs.iter().enumerate() {
        let position = (pairs.len() - place) * 16 + data.len();
        let len = value.len() + if place == 0 { stretch } else { 0 };
        for field in [flags as usize, position, key.len(), len] {
            content.extend(u32::try_from(field).expect("small").to_le_bytes());
        }
        data.extend_from_slice(key);
        data.extend_from_slice(value);
    }
    content.extend(data);
    page(number, LEAF, pairs.len(), more, &content)
}

fn branch(number: u64, children: &[u64]) -> Vec<u8> {
    let mut content = Vec::new();
    for child in children {
        content.extend([0; 8]);
        content.extend(child.to_le_bytes());
    }
    page(number, BRANCH, children.len(), 0, &content)
}

fn bucket(root: u64) -> Vec<u8> {
    [root.to_le_bytes(), [0; 8]].concat()
}

fn meta(number: u64, pages: u64) -> Vec<u8> {
    let mut meta = Vec::new();
    for field in [0xED0C_DAED_u32, 2, PAGE as u32, 0] {
        meta.extend(field.to_le_bytes());
    }
    for field in [2, 0, u64::MAX, pages, number] {
        meta.extend(field.to_le_bytes());
    }
    let fnv = meta.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    meta.extend(fnv.to_le_bytes());
    page(number, 4, 0, 0, &meta)
}

/// The answer to a file with these pages behind the metas; the first one is the root.
fn read(pages: &[Vec<u8>]) -> Result<u64, String> {
    let count = pages.len() as u64 + 2;
    let file = [meta(0, count), meta(1, count), pages.concat()].concat();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("db");
    std::fs::write(&path, file).expect("written");
    let status = Database::open(&path).and_then(|database| database.status());
    status.map(|status| status.total_size).map_err(|error| error.to_string())
}

/// A root with the bucket that makes a file one of etcd, and `other`, whose pages are given.
fn with_bucket(root: u64) -> Vec<u8> {
    let (meta, other) = (bucket(3), bucket(root));
    leaf(2, &[(b"meta", &meta), (b"other", &other)], 1, 0, 0)
}

#[test]
fn values_that_share_bytes_are_refused() {
    let pairs: [(&[u8], &[u8]); 2] = [(b"a", b"one"), (b"b", b"two")];
    let pages = |stretch| [with_bucket(4), leaf(3, &[], 0, 0, 0), leaf(4, &pairs, 0, 0, stretch)];
    assert_eq!(read(&pages(0)), Ok(5 * PAGE as u64));
    let refusal = read(&pages(1)).expect_err("they share a byte");
    assert!(refusal.contains("page 4: pair 1 begins within the one before"), "{refusal}");
}

#[test]
fn a_pair_within_the_list_of_pairs_is_refused() {
    let mut wrong = leaf(4, &[(b"a", b"one")], 0, 0, 0);
    // Its key begins with the list itself.
    wrong[20..24].copy_from_slice(&0_u32.to_le_bytes());
    let refusal = read(&[with_bucket(4), leaf(3, &[], 0, 0, 0), wrong]).expect_err("refused");
    assert!(refusal.contains("page 4: pair 0 begins within"), "{refusal}");
}

#[test]
fn pages_within_other_pages_are_refused() {
    type Pairs = [(&'static [u8], &'static [u8]); 1];
    let (low, high): (Pairs, Pairs) = ([(b"a", b"1")], [(b"b", b"2")]);
    let pages = |more| {
        [
            with_bucket(4),
            leaf(3, &[], 0, 0, 0),
            branch(4, &[5, 6]),
            leaf(5, &low, 0, more, 0),
            leaf(6, &high, 0, 0, 0),
        ]
    };
    assert_eq!(read(&pages(0)), Ok(7 * PAGE as u64));
    let refusal = read(&pages(1)).expect_err("page 6 belongs to page 5");
    assert!(refusal.contains("page 6: it is used twice"), "{refusal}");
}

#[test]
fn many_buckets_in_the_same_pages_are_refused() {
    let names: Vec<String> = (0..70).map(|number| format!("bucket{number}")).collect();
    let mut names: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
    names.sort_unstable();
    let value = bucket(3);
    let pairs: Vec<(&[u8], &[u8])> = names.iter().map(|name| (*name, value.as_slice())).collect();
    let refusal = read(&[leaf(2, &pairs, 1, 0, 0), leaf(3, &[], 0, 0, 0)]).expect_err("refused");
    assert!(refusal.contains("more than 64 buckets"), "{refusal}");
}
