//! Question: what does a read cost inside the store? A single key is one search (about 1 us in a large
//! tree); an item of a list costs about 100 ns, most of it the cache misses of index and row. A page of
//! 500 of a large prefix must not pay for the rest of the prefix, though its answer counts all of it:
//! `page_of_500` beside `list_10k` shows whether that holds. Reading 100 revisions back must not be
//! much dearer than reading the newest one, for kube-apiserver pages at a fixed revision.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kelson_api::etcdserverpb::RangeRequest;
use kelson_benches::state::{Loaded, key, put};

const KEYS: u64 = 300_000;

fn pods() -> RangeRequest {
    RangeRequest {
        key: "/registry/pods/".into(),
        range_end: "/registry/pods0".into(),
        ..RangeRequest::default()
    }
}

fn range(criterion: &mut Criterion) {
    let mut store = Loaded::with_keys(KEYS);
    let reader = store.reader();
    let read = |request: &RangeRequest| reader.range(request).expect("readable").0;
    let mut group = criterion.benchmark_group("range");
    let single = RangeRequest { key: key(77), ..RangeRequest::default() };
    group.bench_function("single_key", |bencher| bencher.iter(|| read(&single)));
    let page = RangeRequest { limit: 500, ..pods() };
    group.throughput(Throughput::Elements(500));
    group.bench_function("page_of_500", |bencher| bencher.iter(|| read(&page)));
    let revision = reader.revision();
    for number in 0..100 {
        store.apply(vec![put(number * 37)]);
    }
    let past = RangeRequest { revision, ..page };
    group.bench_function("page_of_500_a_hundred_revisions_back", |bencher| {
        bencher.iter(|| read(&past));
    });
    let list = RangeRequest { limit: 10_000, ..pods() };
    group.throughput(Throughput::Elements(10_000));
    group.bench_function("list_10k", |bencher| bencher.iter(|| read(&list)));
    let count = RangeRequest { count_only: true, ..pods() };
    group.throughput(Throughput::Elements(KEYS));
    group.bench_function("count_all", |bencher| bencher.iter(|| read(&count)));
    group.finish();
}

criterion_group!(benches, range);
criterion_main!(benches);
