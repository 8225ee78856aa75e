//! Script commands on users, roles and permissions: one call each, and how its answer looks; and what
//! says who makes a call. Whose call it is, is for the session to know.

use kelson_api::authpb;
use kelson_api::etcdserverpb as pb;
use pb::auth_client::AuthClient;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::Lines;
use crate::format;
use crate::parse::Words;

/// Adds to every call what says who calls.
#[derive(Clone, Default)]
pub(super) struct Credentials(pub(super) Option<(&'static str, AsciiMetadataValue)>);

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some((name, value)) = &self.0 {
            request.metadata_mut().insert(*name, value.clone());
        }
        Ok(request)
    }
}

/// Calls with credentials.
pub(super) type Door = InterceptedService<Channel, Credentials>;

/// The next word; empty when missing.
pub(super) fn text(words: &mut Words) -> String {
    words.string().unwrap_or_default()
}

/// `auth enable|disable|status`.
pub(super) async fn switch(auth: &mut AuthClient<Door>, words: &mut Words) -> Lines {
    let header = match text(words).as_str() {
        "enable" => auth.auth_enable(pb::AuthEnableRequest {}).await?.into_inner().header,
        "disable" => auth.auth_disable(pb::AuthDisableRequest {}).await?.into_inner().header,
        "status" => {
            let answer = auth.auth_status(pb::AuthStatusRequest {}).await?.into_inner();
            let header = format::header(answer.header.as_ref());
            let (enabled, revision) = (answer.enabled, answer.auth_revision);
            return Ok(vec![format!("{header} enabled={enabled} auth_revision={revision}")]);
        }
        other => panic!("auth enable|disable|status, not {other:?}"),
    };
    Ok(vec![format::header(header.as_ref())])
}

/// `user add NAME [PASSWORD] [no_password|hashed=TEXT]`, `user passwd NAME [PASSWORD] [hashed=TEXT]`,
/// `user delete|get NAME`, `user list`, `user grant|revoke NAME ROLE`.
pub(super) async fn user_command(auth: &mut AuthClient<Door>, words: &mut Words) -> Lines {
    let action = text(words);
    if action == "list" {
        let answer = auth.user_list(pb::AuthUserListRequest {}).await?.into_inner();
        return Ok(vec![format!("{} {:?}", format::header(answer.header.as_ref()), answer.users)]);
    }
    let name = text(words);
    let header = match action.as_str() {
        "add" => {
            let mut request = pb::AuthUserAddRequest { name, ..Default::default() };
            while let Some(word) = words.string() {
                match word.split_once('=') {
                    _ if word == "no_password" => {
                        request.options = Some(authpb::UserAddOptions { no_password: true });
                    }
                    Some(("hashed", hashed)) => request.hashed_password = hashed.into(),
                    _ => request.password = word,
                }
            }
            auth.user_add(request).await?.into_inner().header
        }
        "passwd" => {
            let mut request = pb::AuthUserChangePasswordRequest { name, ..Default::default() };
            while let Some(word) = words.string() {
                match word.split_once('=') {
                    Some(("hashed", hashed)) => request.hashed_password = hashed.into(),
                    _ => request.password = word,
                }
            }
            auth.user_change_password(request).await?.into_inner().header
        }
        "delete" => auth.user_delete(pb::AuthUserDeleteRequest { name }).await?.into_inner().header,
        "get" => {
            let answer = auth.user_get(pb::AuthUserGetRequest { name }).await?.into_inner();
            let header = format::header(answer.header.as_ref());
            return Ok(vec![format!("{header} {:?}", answer.roles)]);
        }
        "grant" => {
            let request = pb::AuthUserGrantRoleRequest { user: name, role: text(words) };
            auth.user_grant_role(request).await?.into_inner().header
        }
        "revoke" => {
            let request = pb::AuthUserRevokeRoleRequest { name, role: text(words) };
            auth.user_revoke_role(request).await?.into_inner().header
        }
        other => panic!("user knows no action {other:?}"),
    };
    Ok(vec![format::header(header.as_ref())])
}

/// `role add|delete|get NAME`, `role list`, `role grant NAME read|write|readwrite|nothing [KEY [END]]`,
/// `role revoke NAME [KEY [END]]`.
pub(super) async fn role_command(auth: &mut AuthClient<Door>, words: &mut Words) -> Lines {
    let action = text(words);
    if action == "list" {
        let answer = auth.role_list(pb::AuthRoleListRequest {}).await?.into_inner();
        return Ok(vec![format!("{} {:?}", format::header(answer.header.as_ref()), answer.roles)]);
    }
    let role = text(words);
    let header = match action.as_str() {
        "add" => auth.role_add(pb::AuthRoleAddRequest { name: role }).await?.into_inner().header,
        "delete" => auth.role_delete(pb::AuthRoleDeleteRequest { role }).await?.into_inner().header,
        "get" => {
            let answer = auth.role_get(pb::AuthRoleGetRequest { role }).await?.into_inner();
            let mut lines = vec![format::header(answer.header.as_ref())];
            lines.extend(answer.perm.iter().map(|perm| {
                let (key, end) = (format::text(&perm.key), format::text(&perm.range_end));
                format!("  {} {key} {end}", perm.perm_type().as_str_name())
            }));
            return Ok(lines);
        }
        "grant" => {
            let kind = match text(words).as_str() {
                "read" => Some(0),
                "write" => Some(1),
                "readwrite" => Some(2),
                "nothing" => None,
                other => panic!("role grant knows no kind {other:?}"),
            };
            let (key, range_end) = (words.bytes(), words.bytes());
            let perm = kind.map(|perm_type| authpb::Permission { perm_type, key, range_end });
            let request = pb::AuthRoleGrantPermissionRequest { name: role, perm };
            auth.role_grant_permission(request).await?.into_inner().header
        }
        "revoke" => {
            let (key, range_end) = (words.bytes(), words.bytes());
            let request = pb::AuthRoleRevokePermissionRequest { role, key, range_end };
            auth.role_revoke_permission(request).await?.into_inner().header
        }
        other => panic!("role knows no action {other:?}"),
    };
    Ok(vec![format::header(header.as_ref())])
}
