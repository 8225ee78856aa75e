//! `kelson log` from outside: what was asked of a member stands in its log, whether it runs or not.

use kelson_api::Message;
use kelson_api::etcdserverpb::auth_client::AuthClient;
use kelson_api::etcdserverpb::kv_client::KvClient;
use kelson_api::etcdserverpb::{
    AuthEnableRequest, AuthUserAddRequest, AuthUserGrantRoleRequest, AuthenticateRequest,
    DeleteRangeRequest, PutRequest,
};

mod process;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use process::{Server, command};

fn lines(server: &Server, flags: &[&str]) -> Vec<String> {
    let output = command().arg("log").args(flags).arg(server.data_dir()).output();
    let output = output.expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").lines().map(str::to_owned).collect()
}

#[test]
fn requests_of_clients_stand_in_the_log() {
    let server = Server::start(&[]);
    let put = PutRequest { key: "a".into(), value: "b".into(), ..Default::default() };
    let delete = DeleteRangeRequest { key: "a".into(), ..Default::default() };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let address = format!("http://127.0.0.1:{}", server.client);
        let mut kv = KvClient::connect(address).await.expect("it connects");
        kv.put(put.clone()).await.expect("the put");
        kv.delete_range(delete.clone()).await.expect("the delete");
    });
    let mut requests = Vec::new();
    let mut last = 0;
    for line in lines(&server, &["--json"]) {
        let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let Some(commands) = line["commands"].as_array() else { continue };
        let index = line["index"].as_u64().expect("an index");
        assert_eq!(index, last + 1, "{line}");
        last = index;
        for command in commands {
            let bytes = STANDARD.decode(command["request"].as_str().expect("base64"));
            requests.push((command["op"].clone(), bytes.expect("base64")));
        }
    }
    assert!(requests.contains(&("put".into(), put.encode_to_vec())), "{requests:?}");
    assert!(requests.contains(&("delete-range".into(), delete.encode_to_vec())), "{requests:?}");
    let text = lines(&server, &[]);
    assert!(text.iter().any(|line| line.contains("PutRequest")), "{text:?}");
}

#[test]
fn neither_hashes_nor_tokens_are_shown() {
    let server = Server::start(&["--bcrypt-cost=4"]);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let token = runtime.block_on(async {
        let address = format!("http://127.0.0.1:{}", server.client);
        let mut auth = AuthClient::connect(address).await.expect("it connects");
        let (name, password) = ("root".to_owned(), "secret".to_owned());
        let add = AuthUserAddRequest { name, password, ..Default::default() };
        auth.user_add(add).await.expect("a user");
        let grant = AuthUserGrantRoleRequest { user: "root".into(), role: "root".into() };
        auth.user_grant_role(grant).await.expect("granted");
        auth.auth_enable(AuthEnableRequest {}).await.expect("auth on");
        let login = AuthenticateRequest { name: "root".into(), password: "secret".into() };
        auth.authenticate(login).await.expect("a token").into_inner().token
    });
    let (word, _) = token.split_once('.').expect("a simple token");
    let text = lines(&server, &[]).concat();
    assert!(text.contains("UserAdd") && text.contains("Login"), "{text}");
    assert!(!text.contains(word) && !text.contains("secret"), "{text}");
    assert_eq!(text.matches("(hidden)").count(), 2, "{text}");
    for line in lines(&server, &["--json"]) {
        let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        for command in line["commands"].as_array().into_iter().flatten() {
            let bytes = STANDARD.decode(command["request"].as_str().expect("base64"));
            let request = String::from_utf8_lossy(&bytes.expect("base64")).into_owned();
            assert!(!request.contains(word) && !request.contains("JDJh"), "{request}");
        }
    }
}

#[test]
fn what_cannot_be_shown_is_said() {
    let output = command().args(["log", "/nowhere/at/all"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("/nowhere/at/all/member/wal"), "{said}");
    for arguments in [&["log"][..], &["log", "a", "b"], &["log", "--jsn", "a"]] {
        let output = command().args(arguments).output().expect("it runs");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}
