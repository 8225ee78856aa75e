//! The lines that the lab prints to be copied: etcdctl and kube-apiserver against this lab, and the
//! lab's own commands from another shell.

use std::path::Path;

use super::certs::Certs;
use super::folder::Folder;

/// The lines, comments in front.
pub(crate) fn lines(folder: &Folder, certs: Option<&Certs>) -> String {
    let record = &folder.record;
    let urls: Vec<String> =
        record.members.iter().map(|entry| record.url(record.ports(entry.number).client)).collect();
    let urls = urls.join(",");
    let mut etcdctl = format!("etcdctl --endpoints={urls}");
    let mut apiserver = format!("kube-apiserver --etcd-servers={urls}");
    if let Some(certs) = certs {
        let files = [certs.ca(), certs.cert("client"), certs.key("client")];
        let files = files.map(|path| quote(&path));
        for (flag, file) in ["--cacert", "--cert", "--key"].iter().zip(&files) {
            etcdctl.push_str(&format!(" {flag}={file}"));
        }
        for (flag, file) in
            ["--etcd-cafile", "--etcd-certfile", "--etcd-keyfile"].iter().zip(&files)
        {
            apiserver.push_str(&format!(" {flag}={file}"));
        }
    }
    let lab = format!("{} lab --dir {}", quote(&folder.program), quote(&folder.path));
    format!(
        "# etcdctl: write, read, look\n\
         {etcdctl} put greeting hello\n\
         {etcdctl} get greeting\n\
         {etcdctl} endpoint status -w table\n\
         # kube-apiserver, besides its other flags\n\
         {apiserver}\n\
         # this lab from another shell\n\
         {lab} status\n\
         {lab} kill leader\n"
    )
}

/// A path as a shell takes it.
fn quote(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_a_shell() {
        for (path, quoted) in
            [("/a/b-c.pem", "/a/b-c.pem"), ("/a b", "'/a b'"), ("/it's", r"'/it'\''s'")]
        {
            assert_eq!(quote(Path::new(path)), quoted);
        }
    }
}
