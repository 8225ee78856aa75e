//! Writes bbolt's file format, version 2, as a stream. The first pass over the rows plans the leaf
//! pages and keeps of each only its first key and its size; then all page numbers and the size of the
//! file are known, and the second pass fills the pages in order. The small buckets are laid out in
//! memory. It reads no bbolt file and never goes back in its output.
//!
//! Order of pages: two metas, leaves of the row bucket, its branches, the small buckets, the root.
//! There are no free pages and no free list.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;

use super::content::{Bucket, Buckets, KEY_BUCKET};
use super::{CutRows, behind};
use crate::keys::revision_bytes;
use crate::types::{Fatal, RevisionKey, Row};

const PAGE: usize = 4096;
const PAGE_HEADER: usize = 16;
const ELEMENT: usize = 16;
const FLAG_BRANCH: u16 = 1;
const FLAG_LEAF: u16 = 2;
const FLAG_META: u16 = 4;
/// The value of an element is a bucket.
const IS_BUCKET: u32 = 1;
const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
const NO_FREE_LIST: u64 = u64::MAX;
/// First page behind the metas.
const FIRST_PAGE: u64 = 2;
/// Leaves are sent in chunks of about this size.
const CHUNK_BYTES: usize = 1 << 20;

/// One planned leaf of rows.
struct Leaf {
    first: RevisionKey,
    is_tombstone: bool,
    rows: u32,
    pages: u32,
}

/// Everything about the file but the rows themselves.
pub(super) struct Plan {
    leaves: Vec<Leaf>,
    metas: Vec<u8>,
    /// Pages behind the leaves.
    rest: Vec<u8>,
    pages: u64,
}

impl Plan {
    /// The first pass.
    pub(super) fn new(rows: &CutRows, buckets: &Buckets) -> Result<Self, Fatal> {
        let mut leaves = Vec::new();
        let mut open = Filling::default();
        rows.for_each(|rows| {
            for row in rows {
                if !open.fits(row) {
                    leaves.extend(open.close());
                }
                open.add(row);
            }
        })?;
        leaves.extend(open.close());
        Ok(Self::lay_out(leaves, buckets))
    }

    fn lay_out(leaves: Vec<Leaf>, buckets: &Buckets) -> Self {
        let mut next = FIRST_PAGE;
        let mut level = Vec::with_capacity(leaves.len());
        for leaf in &leaves {
            level.push((revision_bytes(leaf.first, leaf.is_tombstone), next));
            next += u64::from(leaf.pages);
        }
        let mut rest = Rest { bytes: Vec::new(), next };
        let mut root = Bucket::new();
        let rows_root = if level.is_empty() { rest.leaf(&[], 0) } else { rest.branches(level) };
        root.insert(KEY_BUCKET.as_bytes().to_vec(), bucket_value(rows_root));
        for (name, pairs) in buckets.0.iter().filter(|(name, _)| **name != KEY_BUCKET) {
            let pairs: Vec<_> = pairs.iter().collect();
            root.insert(name.as_bytes().to_vec(), bucket_value(rest.tree(&pairs, 0)));
        }
        let root_page = rest.tree(&root.iter().collect::<Vec<_>>(), IS_BUCKET);
        let pages = rest.next;
        let metas = [meta_page(0, root_page, pages, 2), meta_page(1, root_page, pages, 1)].concat();
        Self { leaves, metas, rest: rest.bytes, pages }
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.pages * PAGE as u64
    }

    /// The second pass.
    pub(super) fn emit(self, rows: CutRows) -> Emission {
        Emission {
            metas: Some(self.metas),
            leaves: self.leaves.into_iter(),
            next_page: FIRST_PAGE,
            rows,
            from: RevisionKey::default(),
            read: Vec::new().into_iter(),
            rest: Bytes::from(self.rest),
            is_failed: false,
        }
    }
}

/// A leaf while it is planned.
#[derive(Default)]
struct Filling {
    leaf: Option<Leaf>,
    bytes: usize,
}

impl Filling {
    /// A leaf holds at least two rows, however large.
    fn fits(&self, row: &Row) -> bool {
        let Some(leaf) = &self.leaf else { return true };
        leaf.rows < 2 || (self.bytes + row_bytes(row) <= PAGE && leaf.rows < u32::from(u16::MAX))
    }

    fn add(&mut self, row: &Row) {
        let (first, is_tombstone) = (row.key, row.tombstone);
        let fresh = || Leaf { first, is_tombstone, rows: 0, pages: 0 };
        if self.leaf.is_none() {
            self.bytes = PAGE_HEADER;
        }
        self.leaf.get_or_insert_with(fresh).rows += 1;
        self.bytes += row_bytes(row);
    }

    fn close(&mut self) -> Option<Leaf> {
        let mut leaf = self.leaf.take()?;
        leaf.pages = u32::try_from(self.bytes.div_ceil(PAGE)).expect("two rows are below 16 TiB");
        Some(leaf)
    }
}

fn row_bytes(row: &Row) -> usize {
    ELEMENT + 17 + usize::from(row.tombstone) + row.kv.len()
}

/// Pages laid out in memory.
struct Rest {
    bytes: Vec<u8>,
    /// Number of the next page.
    next: u64,
}

impl Rest {
    /// A whole tree of pairs in key order; returns its root.
    fn tree(&mut self, pairs: &[(&Vec<u8>, &Vec<u8>)], flags: u32) -> u64 {
        let mut level = Vec::new();
        let sizes = pairs.iter().map(|(key, value)| ELEMENT + key.len() + value.len());
        for range in pack(sizes) {
            let pairs = &pairs[range];
            let first = pairs.first().map_or_else(Vec::new, |(key, _)| (*key).clone());
            level.push((first, self.leaf(pairs, flags)));
        }
        if level.is_empty() { self.leaf(&[], flags) } else { self.branches(level) }
    }

    fn leaf(&mut self, pairs: &[(&Vec<u8>, &Vec<u8>)], flags: u32) -> u64 {
        let pairs = pairs.iter().map(|(key, value)| (key.as_slice(), value.as_slice()));
        let page = leaf_page(self.next, &pairs.collect::<Vec<_>>(), flags);
        self.put(&page)
    }

    /// Branch levels over children with their first keys, until one page is left.
    fn branches(&mut self, mut level: Vec<(Vec<u8>, u64)>) -> u64 {
        while level.len() > 1 {
            let mut parents = Vec::new();
            for range in pack(level.iter().map(|(key, _)| ELEMENT + key.len())) {
                let children = &level[range];
                let page = branch_page(self.next, children);
                parents.push((children[0].0.clone(), self.put(&page)));
            }
            level = parents;
        }
        level[0].1
    }

    fn put(&mut self, page: &[u8]) -> u64 {
        let number = self.next;
        self.bytes.extend_from_slice(page);
        self.next += (page.len() / PAGE) as u64;
        number
    }
}

/// A whole file with any buckets, in memory: for the fuzz target of who reads such files.
pub(crate) fn file_of(buckets: &BTreeMap<&'static str, Bucket>) -> Vec<u8> {
    let mut rest = Rest { bytes: Vec::new(), next: FIRST_PAGE };
    let mut root = Bucket::new();
    for (name, pairs) in buckets {
        let page = rest.tree(&pairs.iter().collect::<Vec<_>>(), 0);
        root.insert(name.as_bytes().to_vec(), bucket_value(page));
    }
    let root_page = rest.tree(&root.iter().collect::<Vec<_>>(), IS_BUCKET);
    let metas = [2, 1].map(|number| meta_page(2 - number, root_page, rest.next, number));
    [metas.concat(), rest.bytes].concat()
}

/// Cuts elements into pages: as many as fit, at least two.
fn pack(sizes: impl Iterator<Item = usize>) -> Vec<std::ops::Range<usize>> {
    let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
    let mut used = 0;
    for (place, size) in sizes.enumerate() {
        match ranges.last_mut() {
            Some(last) if last.len() < 2 || used + size <= PAGE => last.end = place + 1,
            _ => {
                ranges.push(place..place + 1);
                used = PAGE_HEADER;
            }
        }
        used += size;
    }
    ranges
}

fn bucket_value(root: u64) -> Vec<u8> {
    // Root page and sequence; etcd uses no sequence.
    [root.to_le_bytes(), 0_u64.to_le_bytes()].concat()
}

fn push_header(page: &mut Vec<u8>, number: u64, flags: u16, count: usize, pages: usize) {
    let count = u16::try_from(count).expect("a page holds fewer than 2^16 elements");
    let overflow = u32::try_from(pages - 1).expect("a page is below 16 TiB");
    page.extend_from_slice(&number.to_le_bytes());
    page.extend_from_slice(&flags.to_le_bytes());
    page.extend_from_slice(&count.to_le_bytes());
    page.extend_from_slice(&overflow.to_le_bytes());
}

fn number(value: usize) -> u32 {
    u32::try_from(value).expect("a page is below 4 GiB")
}

fn leaf_page(number_of_page: u64, pairs: &[(&[u8], &[u8])], flags: u32) -> Vec<u8> {
    let data: usize = pairs.iter().map(|(key, value)| ELEMENT + key.len() + value.len()).sum();
    let pages = (PAGE_HEADER + data).div_ceil(PAGE);
    let mut page = Vec::with_capacity(pages * PAGE);
    push_header(&mut page, number_of_page, FLAG_LEAF, pairs.len(), pages);
    let mut position = pairs.len() * ELEMENT;
    for (key, value) in pairs {
        // Positions count from the element itself.
        for field in [flags, number(position), number(key.len()), number(value.len())] {
            page.extend_from_slice(&field.to_le_bytes());
        }
        position = position + key.len() + value.len() - ELEMENT;
    }
    for (key, value) in pairs {
        page.extend_from_slice(key);
        page.extend_from_slice(value);
    }
    page.resize(pages * PAGE, 0);
    page
}

fn branch_page(number_of_page: u64, children: &[(Vec<u8>, u64)]) -> Vec<u8> {
    let data: usize = children.iter().map(|(key, _)| ELEMENT + key.len()).sum();
    let pages = (PAGE_HEADER + data).div_ceil(PAGE);
    let mut page = Vec::with_capacity(pages * PAGE);
    push_header(&mut page, number_of_page, FLAG_BRANCH, children.len(), pages);
    let mut position = children.len() * ELEMENT;
    for (key, child) in children {
        page.extend_from_slice(&number(position).to_le_bytes());
        page.extend_from_slice(&number(key.len()).to_le_bytes());
        page.extend_from_slice(&child.to_le_bytes());
        position = position + key.len() - ELEMENT;
    }
    for (key, _) in children {
        page.extend_from_slice(key);
    }
    page.resize(pages * PAGE, 0);
    page
}

fn meta_page(number_of_page: u64, root: u64, pages: u64, transaction: u64) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE);
    push_header(&mut page, number_of_page, FLAG_META, 0, 1);
    let start = page.len();
    for field in [MAGIC, VERSION, PAGE as u32, 0] {
        page.extend_from_slice(&field.to_le_bytes());
    }
    for field in [root, 0, NO_FREE_LIST, pages, transaction] {
        page.extend_from_slice(&field.to_le_bytes());
    }
    let checksum = fnv(&page[start..]);
    page.extend_from_slice(&checksum.to_le_bytes());
    page.resize(PAGE, 0);
    page
}

/// FNV-1a, 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The bytes of the file, in order.
pub(super) struct Emission {
    metas: Option<Vec<u8>>,
    leaves: std::vec::IntoIter<Leaf>,
    next_page: u64,
    rows: CutRows,
    /// Where the next read starts.
    from: RevisionKey,
    read: std::vec::IntoIter<Row>,
    rest: Bytes,
    is_failed: bool,
}

impl Emission {
    fn next_row(&mut self) -> io::Result<Option<Row>> {
        if self.read.len() == 0 {
            let rows = self.rows.next(self.from).map_err(io::Error::other)?;
            if let Some(last) = rows.last() {
                self.from = behind(last.key);
            }
            self.read = rows.into_iter();
        }
        Ok(self.read.next())
    }

    fn fill(&mut self, leaf: &Leaf) -> io::Result<Vec<u8>> {
        let mut rows = Vec::with_capacity(leaf.rows as usize);
        for _ in 0..leaf.rows {
            let row = self.next_row()?.ok_or_else(moved)?;
            rows.push((revision_bytes(row.key, row.tombstone), row.kv));
        }
        let pairs = rows.iter().map(|(key, kv)| (key.as_slice(), kv.as_ref()));
        let page = leaf_page(self.next_page, &pairs.collect::<Vec<_>>(), 0);
        let is_as_planned = rows[0].0 == revision_bytes(leaf.first, leaf.is_tombstone)
            && page.len() == leaf.pages as usize * PAGE;
        self.next_page += u64::from(leaf.pages);
        is_as_planned.then_some(page).ok_or_else(moved)
    }

    fn some_leaves(&mut self) -> io::Result<Vec<u8>> {
        let mut chunk = Vec::new();
        while chunk.len() < CHUNK_BYTES {
            let Some(leaf) = self.leaves.next() else { break };
            chunk.append(&mut self.fill(&leaf)?);
        }
        Ok(chunk)
    }
}

/// The rows are held while the file is sent, so this is a defect, not an accident.
fn moved() -> io::Error {
    io::Error::other("rows changed while a snapshot was sent")
}

impl Iterator for Emission {
    type Item = io::Result<Bytes>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_failed {
            return None;
        }
        if let Some(metas) = self.metas.take() {
            return Some(Ok(Bytes::from(metas)));
        }
        if self.leaves.len() > 0 {
            let chunk = self.some_leaves();
            self.is_failed = chunk.is_err();
            return Some(chunk.map(Bytes::from));
        }
        let size = self.rest.len().min(CHUNK_BYTES);
        (size > 0).then(|| Ok(self.rest.split_to(size)))
    }
}
