//! The Auth service: users, roles, and tokens for those who know a password. Passwords are hashed here
//! (`hashing`) and go no further: what goes into the log is a hash. Who may change users is decided
//! where the change is applied.

use std::sync::Arc;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::auth_server::Auth;
use kelson_api::etcdserverpb::*;
use kelson_raft::Node;
use kelson_storage::{Reader, Reply};
use tonic::{Request, Response, Status};

use super::gate::Gate;
use super::hashing::Hashing;
use super::mismatched;
use crate::app::App;
use crate::callers::{Caller, Callers};
use crate::header::header;

/// Serves users, roles and tokens.
pub(super) struct AuthService {
    node: Node,
    reader: Reader,
    gate: Gate,
    callers: Arc<Callers>,
    hashing: Hashing,
}

impl AuthService {
    pub(super) fn new(app: &App) -> Self {
        Self {
            node: app.node.clone(),
            reader: app.reader.clone(),
            gate: Gate::new(app),
            callers: Arc::clone(&app.callers),
            hashing: Hashing::new(app.limits.bcrypt_cost),
        }
    }

    fn header(&self, revision: i64) -> Option<ResponseHeader> {
        Some(header(&self.node, revision))
    }

    /// Proposes a change; gives the header of the answer.
    async fn change(&self, caller: Caller, op: Op) -> Result<Option<ResponseHeader>, Status> {
        let outcome = caller.propose(op).await?;
        match outcome.result? {
            Reply::Auth => Ok(self.header(outcome.revision)),
            other => Err(mismatched("Auth", &other)),
        }
    }

    /// Waits until this member knows all that was changed before; gives the header of the answer.
    async fn catch_up(&self) -> Result<Option<ResponseHeader>, Error> {
        self.node.read_barrier().await?;
        Ok(self.header(self.reader.revision()))
    }

    /// Whether a password is right; gives the auth revision at which it is.
    async fn check_password(&self, request: &AuthenticateRequest) -> Result<u64, Status> {
        if !self.reader.is_auth_enabled() {
            return Err(Error::AuthNotEnabled.into());
        }
        let revision = self.reader.auth_revision();
        let user = self.reader.user(&request.name).map_err(|_| Error::AuthFailed)?;
        if user.options.is_some_and(|options| options.no_password) {
            return Err(Error::NoPasswordUser.into());
        }
        let is_right = self.hashing.check(request.password.clone(), user.password);
        if !is_right.await? {
            tracing::warn!(user = request.name, "invalid authentication was requested");
            return Err(Error::AuthFailed.into());
        }
        Ok(revision)
    }
}

#[tonic::async_trait]
impl Auth for AuthService {
    async fn auth_enable(
        &self,
        request: Request<AuthEnableRequest>,
    ) -> Result<Response<AuthEnableResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::AuthEnable(request)).await?;
        Ok(Response::new(AuthEnableResponse { header }))
    }

    async fn auth_disable(
        &self,
        request: Request<AuthDisableRequest>,
    ) -> Result<Response<AuthDisableResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::AuthDisable(request)).await?;
        Ok(Response::new(AuthDisableResponse { header }))
    }

    async fn auth_status(
        &self,
        request: Request<AuthStatusRequest>,
    ) -> Result<Response<AuthStatusResponse>, Status> {
        let (caller, _) = self.gate.take(request)?;
        // Anybody may know, but a token must be right.
        let _anybody = caller.asker().await?;
        let header = self.catch_up().await?;
        let (enabled, auth_revision) = (self.reader.is_auth_enabled(), self.reader.auth_revision());
        Ok(Response::new(AuthStatusResponse { header, enabled, auth_revision }))
    }

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let (_whoever, request) = self.gate.take(request)?;
        self.node.read_barrier().await?;
        let token = loop {
            let revision = self.check_password(&request).await?;
            let token = self.callers.log_in(&request.name, revision).await?;
            // Otherwise the password may have been changed while it was checked.
            if revision == self.reader.auth_revision() {
                break token;
            }
        };
        let header = self.header(self.reader.revision());
        Ok(Response::new(AuthenticateResponse { header, token }))
    }

    async fn user_add(
        &self,
        request: Request<AuthUserAddRequest>,
    ) -> Result<Response<AuthUserAddResponse>, Status> {
        let (caller, mut request) = self.gate.take(request)?;
        // Nobody else should make this member compute.
        caller.admin().await?;
        let password = std::mem::take(&mut request.password);
        if !request.options.is_some_and(|options| options.no_password) {
            request.hashed_password = self.hashing.hash(password).await?;
        }
        let header = self.change(caller, Op::UserAdd(request)).await?;
        Ok(Response::new(AuthUserAddResponse { header }))
    }

    async fn user_get(
        &self,
        request: Request<AuthUserGetRequest>,
    ) -> Result<Response<AuthUserGetResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.catch_up().await?;
        let asker = caller.asker().await?;
        // As in etcd, who says nothing of himself may ask for the user without a name.
        if request.name != asker.user {
            self.reader.check_admin(&asker)?;
        }
        let roles = self.reader.user(&request.name)?.roles;
        Ok(Response::new(AuthUserGetResponse { header, roles }))
    }

    async fn user_list(
        &self,
        request: Request<AuthUserListRequest>,
    ) -> Result<Response<AuthUserListResponse>, Status> {
        let (caller, _) = self.gate.take(request)?;
        let header = self.catch_up().await?;
        caller.admin().await?;
        Ok(Response::new(AuthUserListResponse { header, users: self.reader.users() }))
    }

    async fn user_delete(
        &self,
        request: Request<AuthUserDeleteRequest>,
    ) -> Result<Response<AuthUserDeleteResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::UserDelete(request)).await?;
        Ok(Response::new(AuthUserDeleteResponse { header }))
    }

    async fn user_change_password(
        &self,
        request: Request<AuthUserChangePasswordRequest>,
    ) -> Result<Response<AuthUserChangePasswordResponse>, Status> {
        let (caller, mut request) = self.gate.take(request)?;
        caller.admin().await?;
        let password = std::mem::take(&mut request.password);
        if !password.is_empty() {
            request.hashed_password = self.hashing.hash(password).await?;
        }
        let header = self.change(caller, Op::UserChangePassword(request)).await?;
        Ok(Response::new(AuthUserChangePasswordResponse { header }))
    }

    async fn user_grant_role(
        &self,
        request: Request<AuthUserGrantRoleRequest>,
    ) -> Result<Response<AuthUserGrantRoleResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::UserGrantRole(request)).await?;
        Ok(Response::new(AuthUserGrantRoleResponse { header }))
    }

    async fn user_revoke_role(
        &self,
        request: Request<AuthUserRevokeRoleRequest>,
    ) -> Result<Response<AuthUserRevokeRoleResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::UserRevokeRole(request)).await?;
        Ok(Response::new(AuthUserRevokeRoleResponse { header }))
    }

    async fn role_add(
        &self,
        request: Request<AuthRoleAddRequest>,
    ) -> Result<Response<AuthRoleAddResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::RoleAdd(request)).await?;
        Ok(Response::new(AuthRoleAddResponse { header }))
    }

    async fn role_get(
        &self,
        request: Request<AuthRoleGetRequest>,
    ) -> Result<Response<AuthRoleGetResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.catch_up().await?;
        let asker = caller.asker().await?;
        if !self.reader.has_role(&asker.user, &request.role) {
            self.reader.check_admin(&asker)?;
        }
        let perm = self.reader.role(&request.role)?;
        Ok(Response::new(AuthRoleGetResponse { header, perm }))
    }

    async fn role_list(
        &self,
        request: Request<AuthRoleListRequest>,
    ) -> Result<Response<AuthRoleListResponse>, Status> {
        let (caller, _) = self.gate.take(request)?;
        let header = self.catch_up().await?;
        caller.admin().await?;
        Ok(Response::new(AuthRoleListResponse { header, roles: self.reader.roles() }))
    }

    async fn role_delete(
        &self,
        request: Request<AuthRoleDeleteRequest>,
    ) -> Result<Response<AuthRoleDeleteResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::RoleDelete(request)).await?;
        Ok(Response::new(AuthRoleDeleteResponse { header }))
    }

    async fn role_grant_permission(
        &self,
        request: Request<AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<AuthRoleGrantPermissionResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::RoleGrantPermission(request)).await?;
        Ok(Response::new(AuthRoleGrantPermissionResponse { header }))
    }

    async fn role_revoke_permission(
        &self,
        request: Request<AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<AuthRoleRevokePermissionResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let header = self.change(caller, Op::RoleRevokePermission(request)).await?;
        Ok(Response::new(AuthRoleRevokePermissionResponse { header }))
    }
}
