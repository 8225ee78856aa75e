//! docs/COMPATIBILITY.md promises to list all of etcd's API with what proves it: this looks whether
//! every method, message and field of proto/etcd is there, and whether every script and file that is
//! named as proof exists.

use std::collections::BTreeMap;

use kelson_api::ETCD_DESCRIPTORS;
use kelson_tests::server::root;
use prost_reflect::DescriptorPool;

fn page() -> String {
    std::fs::read_to_string(root().join("docs/COMPATIBILITY.md")).expect("the page is readable")
}

/// Cells of the rows of the table below this heading.
fn rows(page: &str, heading: &str) -> Vec<Vec<String>> {
    let (_, section) = page.split_once(&format!("## {heading}\n")).expect("the heading is there");
    let section = section.split("\n## ").next().unwrap_or_default();
    let lines = section.lines().filter(|line| line.starts_with("| ")).skip(1);
    lines
        .map(|line| {
            line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()
        })
        .collect()
}

fn pool() -> DescriptorPool {
    DescriptorPool::decode(ETCD_DESCRIPTORS).expect("descriptors")
}

#[test]
fn every_message_and_field_is_listed() {
    let page = page();
    let listed: BTreeMap<String, Vec<String>> = rows(&page, "Messages and fields")
        .into_iter()
        .map(|cells| {
            assert!(cells.len() == 3 && !cells[2].is_empty(), "{cells:?}");
            let fields = cells[1].split(", ").map(|field| field.trim_matches('`').to_owned());
            (cells[0].clone(), fields.filter(|field| field != "-").collect())
        })
        .collect();
    let pool = pool();
    for message in pool.all_messages() {
        let fields: Vec<_> = message.fields().map(|field| field.name().to_owned()).collect();
        let mut listed = listed.get(message.name()).cloned().unwrap_or_default();
        let mut sorted = fields.clone();
        listed.sort();
        sorted.sort();
        assert_eq!(listed, sorted, "{}: the row should be {}", message.name(), fields.join(", "));
    }
}

#[test]
fn every_method_is_listed() {
    let page = page();
    let rows = rows(&page, "RPCs");
    for service in pool().services() {
        let short = if service.package_name() == "grpc.health.v1" {
            service.package_name()
        } else {
            service.name()
        };
        for method in service.methods() {
            let is_listed = rows.iter().any(|cells| {
                cells[0] == short
                    && (cells[1] == "all" || cells[1].split(", ").any(|name| name == method.name()))
            });
            assert!(is_listed, "{}", method.full_name());
        }
    }
}

#[test]
fn every_proof_exists() {
    let page = page();
    let scripts = root().join("tests/scripts");
    let groups: Vec<String> = std::fs::read_dir(&scripts)
        .expect("scripts")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    let mut proofs = 0;
    for heading in ["RPCs", "HTTP", "Messages and fields"] {
        for cells in rows(&page, heading) {
            let proof = cells.last().expect("a row has cells");
            for word in proof.split([' ', ',', ';', ':', '(', ')']) {
                let (group, name) = word.split_once('/').unwrap_or((word, ""));
                let path = if groups.iter().any(|known| known == group) {
                    scripts.join(group).join(name.trim_end_matches('*'))
                } else if word.contains('/') {
                    root().join(word)
                } else {
                    continue;
                };
                assert!(path.exists(), "{word} in the row of {}", cells[0]);
                proofs += 1;
            }
        }
    }
    assert!(proofs > 100, "only {proofs} proofs were found");
}
