//! Generates crates/api/src/generated from proto/ with protox, so no protoc binary is needed: the Rust
//! code of all packages, and the descriptors of etcd's, which the JSON gateway goes by.
//! `--check` fails when the committed files differ from what would be generated.

use std::fs;

use crate::root;

const FILES: [&str; 8] = [
    "etcd/kv.proto",
    "etcd/auth.proto",
    "etcd/rpc.proto",
    "etcd/lock.proto",
    "etcd/election.proto",
    "etcd/health.proto",
    "internal/command.proto",
    "internal/peer.proto",
];

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let check = args.iter().any(|arg| arg == "--check");
    let scratch = tempfile::tempdir().map_err(|e| format!("make a scratch directory: {e}"))?;
    generate(scratch.path())?;
    let target = root().join("crates/api/src/generated");
    for entry in fs::read_dir(scratch.path()).map_err(|e| format!("list generated files: {e}"))? {
        let path = entry.map_err(|e| format!("list generated files: {e}"))?.path();
        let name = path.file_name().expect("a listed file has a name").to_owned();
        let fresh = fs::read(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
        let committed = target.join(&name);
        let same = fs::read(&committed).is_ok_and(|old| old == fresh);
        if same {
            continue;
        }
        if check {
            return Err(format!("{} is stale: run `cargo xtask codegen`", committed.display()));
        }
        fs::write(&committed, fresh).map_err(|e| format!("write {}: {e}", committed.display()))?;
    }
    Ok(())
}

fn generate(out: &std::path::Path) -> Result<(), String> {
    let proto = root().join("proto");
    let descriptors =
        protox::compile(FILES, [&proto]).map_err(|e| format!("compile proto files: {e}"))?;
    fs::write(out.join("etcd_descriptors.bin"), etcd_descriptors(&proto)?)
        .map_err(|e| format!("write the descriptors: {e}"))?;
    tonic_prost_build::configure()
        .bytes(".")
        .out_dir(out)
        .server_mod_attribute(".", "#[cfg(feature = \"rpc\")]")
        .client_mod_attribute(".", "#[cfg(feature = \"rpc\")]")
        .build_transport(true)
        .compile_fds(descriptors)
        .map_err(|e| format!("generate code: {e}"))
}

/// The files of etcd's packages as an encoded FileDescriptorSet, without comments and places.
fn etcd_descriptors(proto: &std::path::Path) -> Result<Vec<u8>, String> {
    let explain = |e: protox::Error| format!("compile proto files: {e}");
    let mut compiler = protox::Compiler::new([proto]).map_err(explain)?;
    compiler.include_imports(true).include_source_info(false);
    compiler.open_files(FILES.iter().filter(|file| file.starts_with("etcd/"))).map_err(explain)?;
    Ok(compiler.encode_file_descriptor_set())
}
