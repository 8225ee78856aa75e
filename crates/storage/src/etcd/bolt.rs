//! Reads bbolt's file format, version 2: pages, buckets, pairs in key order. One page is in memory per
//! level of the tree, whatever the size of the file. It writes nothing and knows nothing of etcd.
//! Below `database`, above the file system.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::EtcdFileError;

const PAGE_HEADER: usize = 16;
const ELEMENT: usize = 16;
/// Length of a meta behind its page header, checksum included.
const META: usize = 64;
const FLAG_BRANCH: u16 = 1;
const FLAG_LEAF: u16 = 2;
/// The value of an element is a bucket.
const IS_BUCKET: u32 = 1;
/// Root page and sequence in front of an inline bucket.
const BUCKET_HEADER: usize = 16;
const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
/// Page sizes that systems have. The second meta stands at the start of the second page.
const PAGE_SIZES: [u64; 7] = [1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16];
/// A tree with two children per branch and as many pages as fit into a file is not deeper.
const DEPTH_MAX: usize = 64;
/// Buckets of one file; etcd has ten. Each is walked on its own, so they may share pages: this bounds
/// how often a page is read.
const BUCKETS_MAX: usize = 64;
/// Longest run of pages: one value is at most a few MiB in etcd, and this stays in memory.
const RUN_BYTES_MAX: u64 = 1 << 30;

/// An open file.
#[derive(Debug)]
pub(super) struct Bolt {
    path: PathBuf,
    file: File,
    page_bytes: u64,
    /// Pages in use are below this number.
    pages: u64,
    root: u64,
}

/// Where the pairs of a bucket are.
#[derive(Clone, Debug)]
pub(super) enum Bucket {
    /// In a tree with this root page.
    Tree(u64),
    /// In a page within the parent's value.
    Inline(Vec<u8>),
}

/// What a walk calls for each element: key, value, and whether the value is a bucket.
type Each<'a> = &'a mut dyn FnMut(&[u8], &[u8], bool) -> Result<(), EtcdFileError>;

/// What a walk has seen: no page twice, no key out of order.
struct Walk {
    seen: Vec<u64>,
    last: Option<Vec<u8>>,
}

impl Walk {
    fn new(pages: u64) -> Self {
        Self { seen: vec![0; pages.div_ceil(64) as usize], last: None }
    }

    /// False if the page was visited before.
    fn visit(&mut self, page: u64) -> bool {
        let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
        let was_seen = self.seen[word] & bit != 0;
        self.seen[word] |= bit;
        !was_seen
    }

    /// False if the key does not follow the one before.
    fn follows(&mut self, key: &[u8]) -> bool {
        let last = self.last.get_or_insert_default();
        // An empty key can only be the first one, and bbolt has none.
        let follows = key > last.as_slice();
        last.clear();
        last.extend_from_slice(key);
        follows
    }
}

struct Meta {
    page_bytes: u64,
    root: u64,
    pages: u64,
    transaction: u64,
}

impl Bolt {
    /// Opens a file; bytes behind its pages do not matter.
    pub(super) fn open(path: &Path) -> Result<Self, EtcdFileError> {
        let file = File::open(path).map_err(|error| EtcdFileError::io("open", path, error))?;
        let about = file.metadata().map_err(|error| EtcdFileError::io("read", path, error))?;
        if !about.is_file() {
            return Err(foreign(path, "it is no regular file"));
        }
        let file_bytes = about.len();
        let meta = newest_meta(path, &file, file_bytes)?;
        if meta.pages.checked_mul(meta.page_bytes).is_none_or(|bytes| bytes > file_bytes) {
            let reason = format!(
                "the database has {} pages of {} bytes, the file ends before: it was cut short",
                meta.pages, meta.page_bytes
            );
            return Err(EtcdFileError::damaged(path, file_bytes, reason));
        }
        let Meta { page_bytes, pages, root, .. } = meta;
        Ok(Self { path: path.to_owned(), file, page_bytes, pages, root })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Size of the database. Unit: bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.pages * self.page_bytes
    }

    fn damaged(&self, page: u64, reason: impl Into<String>) -> EtcdFileError {
        let reason = format!("page {page}: {}", reason.into());
        EtcdFileError::damaged(&self.path, page.saturating_mul(self.page_bytes), reason)
    }

    /// All buckets at the top, by name.
    pub(super) fn buckets(&self) -> Result<BTreeMap<Vec<u8>, Bucket>, EtcdFileError> {
        let mut buckets = BTreeMap::new();
        let mut walk = Walk::new(self.pages);
        self.tree(self.root, 0, &mut walk, &mut |name, value, is_bucket| {
            if !is_bucket {
                return Err(self.damaged(self.root, "the root holds a pair that is no bucket"));
            }
            if buckets.len() == BUCKETS_MAX {
                return Err(self.damaged(self.root, format!("more than {BUCKETS_MAX} buckets")));
            }
            buckets.insert(name.to_vec(), self.bucket(value)?);
            Ok(())
        })?;
        Ok(buckets)
    }

    fn bucket(&self, value: &[u8]) -> Result<Bucket, EtcdFileError> {
        let Some((header, inline)) = value.split_at_checked(BUCKET_HEADER) else {
            return Err(self.damaged(self.root, "a bucket without a header"));
        };
        Ok(match le64(header, 0) {
            0 => Bucket::Inline(inline.to_vec()),
            root => Bucket::Tree(root),
        })
    }

    /// Calls `each` on all pairs of a bucket in key order. Buckets in a bucket are refused: etcd has
    /// none.
    pub(super) fn for_each(
        &self,
        bucket: &Bucket,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), EtcdFileError>,
    ) -> Result<(), EtcdFileError> {
        let mut pair = |key: &[u8], value: &[u8], is_bucket: bool| {
            if is_bucket {
                return Err(self.damaged(self.root, "a bucket within a bucket"));
            }
            each(key, value)
        };
        match bucket {
            Bucket::Tree(root) => self.tree(*root, 0, &mut Walk::new(self.pages), &mut pair),
            Bucket::Inline(page) => {
                let flags = page.get(8..10).map_or(0, |flags| le16(flags, 0));
                if flags & FLAG_LEAF == 0 {
                    return Err(self.damaged(self.root, "an inline bucket that is no leaf"));
                }
                self.leaf(self.root, page, &mut Walk::new(0), &mut pair)
            }
        }
    }

    fn tree(
        &self,
        number: u64,
        depth: usize,
        walk: &mut Walk,
        each: Each<'_>,
    ) -> Result<(), EtcdFileError> {
        if depth > DEPTH_MAX {
            return Err(self.damaged(number, "the tree is too deep"));
        }
        let page = self.page(number, walk)?;
        match le16(&page, 8) & (FLAG_BRANCH | FLAG_LEAF) {
            FLAG_LEAF => self.leaf(number, &page, walk, each),
            FLAG_BRANCH => {
                let children = self.children(number, &page)?;
                drop(page);
                children.into_iter().try_for_each(|child| self.tree(child, depth + 1, walk, each))
            }
            _ => Err(self.damaged(number, "it is neither leaf nor branch")),
        }
    }

    /// Reads a page with those that continue it.
    fn page(&self, number: u64, walk: &mut Walk) -> Result<Vec<u8>, EtcdFileError> {
        // The first two are metas.
        if !(2..self.pages).contains(&number) {
            return Err(self.damaged(number, "there is no such page"));
        }
        let offset = number * self.page_bytes;
        let mut header = [0; PAGE_HEADER];
        self.read(&mut header, offset)?;
        if le64(&header, 0) != number {
            let found = le64(&header, 0);
            return Err(self.damaged(number, format!("it says that it is page {found}")));
        }
        let run = u64::from(le32(&header, 12)) + 1;
        if number + run > self.pages || run * self.page_bytes > RUN_BYTES_MAX {
            return Err(self.damaged(number, "it goes on behind the end"));
        }
        // All that belong to it: else a small file could have many large pages.
        if let Some(again) = (number..number + run).find(|page| !walk.visit(*page)) {
            return Err(self.damaged(again, "it is used twice"));
        }
        let mut page = vec![0; (run * self.page_bytes) as usize];
        self.read(&mut page, offset)?;
        Ok(page)
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), EtcdFileError> {
        let read = self.file.read_exact_at(buffer, offset);
        read.map_err(|error| EtcdFileError::io("read", &self.path, error))
    }

    fn children(&self, number: u64, page: &[u8]) -> Result<Vec<u64>, EtcdFileError> {
        let count = usize::from(le16(page, 10));
        if count == 0 || PAGE_HEADER + count * ELEMENT > page.len() {
            return Err(self.damaged(number, "a branch without room for its children"));
        }
        Ok((0..count).map(|place| le64(page, PAGE_HEADER + place * ELEMENT + 8)).collect())
    }

    fn leaf(
        &self,
        number: u64,
        page: &[u8],
        walk: &mut Walk,
        each: Each<'_>,
    ) -> Result<(), EtcdFileError> {
        let count = page.get(10..12).map_or(0, |count| usize::from(le16(count, 0)));
        let mut free = PAGE_HEADER + count * ELEMENT;
        if free > page.len() {
            return Err(self.damaged(number, "a leaf without room for its pairs"));
        }
        for place in 0..count {
            let element = PAGE_HEADER + place * ELEMENT;
            let field = |at: usize| le32(page, element + at) as usize;
            let key_at = element + field(4);
            let value_at = key_at + field(8);
            let end = value_at + field(12);
            let (Some(key), Some(value)) = (page.get(key_at..value_at), page.get(value_at..end))
            else {
                return Err(self.damaged(number, format!("pair {place} reaches beyond it")));
            };
            // bbolt writes them one behind the other. If they could share bytes, a small page could
            // hold any amount.
            if key_at < free {
                let reason = format!("pair {place} begins within the one before or their list");
                return Err(self.damaged(number, reason));
            }
            free = end;
            if !walk.follows(key) {
                return Err(self.damaged(number, format!("pair {place} is out of order")));
            }
            each(key, value, le32(page, element) & IS_BUCKET != 0)?;
        }
        Ok(())
    }
}

fn foreign(path: &Path, reason: &str) -> EtcdFileError {
    let expected = "a database of etcd (bbolt)";
    EtcdFileError::Foreign { path: path.to_owned(), expected, reason: reason.to_owned() }
}

/// The valid meta with the higher transaction: a crash can spoil only the one that was being written.
fn newest_meta(path: &Path, file: &File, file_bytes: u64) -> Result<Meta, EtcdFileError> {
    let at = |offset: u64| -> Result<Option<Meta>, EtcdFileError> {
        let mut bytes = [0; PAGE_HEADER + META];
        if offset + bytes.len() as u64 > file_bytes {
            return Ok(None);
        }
        let read = file.read_exact_at(&mut bytes, offset);
        read.map_err(|error| EtcdFileError::io("read", path, error))?;
        Ok(parse_meta(&bytes[PAGE_HEADER..]))
    };
    let first = at(0)?;
    let second = match &first {
        Some(meta) => at(meta.page_bytes)?,
        None => {
            let mut found = None;
            for page_bytes in PAGE_SIZES {
                found = at(page_bytes)?.filter(|meta| meta.page_bytes == page_bytes);
                if found.is_some() {
                    break;
                }
            }
            found
        }
    };
    let newest = [first, second].into_iter().flatten().max_by_key(|meta| meta.transaction);
    newest.ok_or_else(|| foreign(path, "neither of its first two pages is a sound meta page"))
}

fn parse_meta(meta: &[u8]) -> Option<Meta> {
    let page_bytes = u64::from(le32(meta, 8));
    let is_sound = le32(meta, 0) == MAGIC
        && le32(meta, 4) == VERSION
        && PAGE_SIZES.contains(&page_bytes)
        && le64(meta, 56) == checksum(&meta[..56]);
    is_sound.then(|| Meta {
        page_bytes,
        root: le64(meta, 16),
        pages: le64(meta, 40),
        transaction: le64(meta, 48),
    })
}

/// FNV-1a, 64 bits.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

/// For the fuzz target: pages of any bytes behind a meta page that is sound. Each page gets its number,
/// so that the walk goes on.
pub(super) fn with_sound_meta(data: &[u8]) -> Vec<u8> {
    const PAGE: usize = 1024;
    let pages = data.len().div_ceil(PAGE).max(1) + 2;
    let mut file = vec![0; 2 * PAGE];
    file.extend_from_slice(data);
    file.resize(pages * PAGE, 0);
    for page in 2..pages {
        file[page * PAGE..page * PAGE + 8].copy_from_slice(&(page as u64).to_le_bytes());
    }
    let mut meta = Vec::with_capacity(META);
    for field in [MAGIC, VERSION, PAGE as u32, 0] {
        meta.extend_from_slice(&field.to_le_bytes());
    }
    for field in [2, 0, u64::MAX, pages as u64, 7] {
        meta.extend_from_slice(&field.to_le_bytes());
    }
    let sum = checksum(&meta);
    meta.extend_from_slice(&sum.to_le_bytes());
    file[PAGE_HEADER..PAGE_HEADER + META].copy_from_slice(&meta);
    file
}

/// For the fuzz target: any bytes as a whole file whose checksums, page numbers and length are right.
pub(super) fn sealed(data: &[u8]) -> Vec<u8> {
    let named = data.get(PAGE_HEADER + 8..PAGE_HEADER + 12).map_or(0, |field| le32(field, 0));
    let page_bytes = PAGE_SIZES.into_iter().find(|size| *size == u64::from(named));
    let page = page_bytes.unwrap_or(4096) as usize;
    let pages = data.len().div_ceil(page).max(3);
    let mut file = data.to_vec();
    file.resize(pages * page, 0);
    for start in [0, page] {
        let meta = &mut file[start + PAGE_HEADER..start + PAGE_HEADER + META];
        for (place, field) in [MAGIC, VERSION, page as u32].into_iter().enumerate() {
            meta[place * 4..place * 4 + 4].copy_from_slice(&field.to_le_bytes());
        }
        if le64(meta, 40) > pages as u64 {
            meta[40..48].copy_from_slice(&(pages as u64).to_le_bytes());
        }
        let sum = checksum(&meta[..56]);
        meta[56..].copy_from_slice(&sum.to_le_bytes());
    }
    let mut number = 2;
    while number < pages {
        let start = number * page;
        file[start..start + 8].copy_from_slice(&(number as u64).to_le_bytes());
        // Pages that continue this one have no header, as long as they fit in.
        let more = le32(&file, start + 12) as usize;
        number += 1 + if more < pages - number { more } else { 0 };
    }
    file
}
